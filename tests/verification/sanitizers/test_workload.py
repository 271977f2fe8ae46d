import inspect
import re
from pathlib import Path

from engine.ops import Ops
from verification.sanitizers import workload

CSRC = Path(__file__).parents[3] / "csrc"


def operator_names() -> set[str]:
    hidden = {"close", "rope_table"}  # the table is made on the host
    members = inspect.getmembers(Ops, inspect.isfunction)
    return {name for name, _ in members if not name.startswith("_")} - hidden


def test_every_operation_is_a_case(twin: Ops):
    named = {re.match(r"\w+", what)[0] for what, _ in workload.operator_cases(twin)}

    assert named == operator_names()


def test_every_case_of_the_operations_runs(twin: Ops, capsys):
    count = workload.run_cases(workload.operator_cases(twin))

    assert capsys.readouterr().out.count("case ") == count > 30


def test_a_models_steps_run_prefill_decode_and_more_sequences_than_are_fused(make_runner):
    room = {k: v for k, v in vars(workload.ROOM).items() if k != "device"}

    names = []
    for what, call in workload.model_cases("toy", make_runner("toy", **room)):
        call()
        names.append(what)

    fused = int(
        re.search(r"kStepTokens = (\d+)", (CSRC / "kernels/decode_step.cuh").read_text())[1]
    )
    assert any("prefill" in name for name in names) and any("a tap" in name for name in names)
    assert max(int(n) for name in names for n in re.findall(r"of (\d+) sequences", name)) > fused
