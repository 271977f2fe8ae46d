"""Turn a model's name into a directory in Hugging Face form.

Decides which source a name belongs to and where the cache lies. Knows nothing of how a source makes
or fetches its directory, and nothing of what is in it.
"""

import os
from collections.abc import Callable
from pathlib import Path

from engine.errors import CheckpointError
from engine.sources import hub, shape, smollm2, toy

# Called as work goes on with: what is being done, units done, units in all (0: not known).
Progress = Callable[[str, int, int], None]


def cache_root() -> Path:
    """Where models are kept: `$TOUCHSTONE_CACHE`, or a folder of the user's own cache.

    Raises:
        CheckpointError: there is neither.
    """
    configured = os.environ.get("TOUCHSTONE_CACHE")
    if configured:
        return Path(configured)
    try:
        return Path.home() / ".cache" / "touchstone"
    except RuntimeError as error:
        raise CheckpointError(
            "this user has no home directory: name one for models in $TOUCHSTONE_CACHE"
        ) from error


def model_names() -> tuple[str, ...]:
    """The names that need no path and no account."""
    return (*toy.CONFIGS, smollm2.NAME, shape.NAME)


def resolve(name_or_path: str | Path, progress: Progress | None = None) -> Path:
    """The directory of a model, generated or fetched if need be.

    Args:
        name_or_path: one of `model_names()`, a path to a directory in Hugging Face form, or a hub
            id `org/name`.
        progress: told how far a long preparation is.

    Returns:
        A directory with config.json and safetensors weights; with tokenizer.json when the model has
        text.

    Raises:
        CheckpointError: no such model, or it cannot be had: the message says what was tried.
    """
    report = progress if progress is not None else _silent
    name = str(name_or_path)
    if name in toy.CONFIGS:
        return toy.resolve_toy(name, cache_root())
    if name == smollm2.NAME:
        return smollm2.resolve_smollm2(cache_root(), report)
    if name == shape.NAME:
        return shape.resolve_shape(cache_root(), report)
    if not name:
        raise CheckpointError("model must be a name or a path, got an empty one")
    try:
        path = Path(name_or_path).expanduser()
    except RuntimeError as error:
        raise CheckpointError(f"{name}: this user has no home directory") from error
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: no model in Hugging Face form: it has no config.json")
        return path
    if path.exists():
        raise CheckpointError(f"{path}: a model is a directory, this is a file")
    if isinstance(name_or_path, str) and hub.is_hub_id(name):
        return hub.resolve_hub(name)
    raise CheckpointError(
        f"{name!r} is no directory, no hub id of the form org/name "
        f"and none of {', '.join(model_names())}"
    )


def name_of(name_or_path: str | Path) -> str:
    """What a model is called: its name, or the last part of its path or hub id."""
    text = str(name_or_path)
    return text if text in model_names() else Path(text).expanduser().resolve().name


def _silent(what: str, done: int, total: int) -> None:
    """Report nothing."""
