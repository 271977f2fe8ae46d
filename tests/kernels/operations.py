"""The names of what a GPU computes: the operations of engine.ops but the host's own."""

import inspect

from engine.ops import Ops

ON_THE_HOST = {"rope_table"}


def operator_names() -> set[str]:
    members = inspect.getmembers(Ops, inspect.isfunction)
    return {name for name, _ in members if not name.startswith("_")} - ON_THE_HOST - {"close"}
