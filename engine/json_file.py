"""Read the JSON files of a model directory as data that nobody trusts.

Holds the rules for every such file: it lies in the directory, its size is bounded, it is strict
JSON, it is one object, and no key appears twice. Knows nothing of what the keys mean.
"""

import json
from pathlib import Path
from typing import Any

from engine.errors import CheckpointError

MAX_JSON_BYTES = 64 << 20  # the largest honest one, Llama 3's tokenizer.json, is 17 MB


def contained_file(directory: Path, name: str) -> Path:
    """The file `name` of a model directory, if it is one and truly lies there.

    A snapshot of the Hugging Face cache consists of links into its own repository's `blobs`; those
    are the only links out of the directory that are followed.

    Raises:
        CheckpointError: no such file, not a plain file, or a link that leaves the directory.
    """
    path = directory / name
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    home = directory.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    target = path.resolve()
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{path}: a link out of the model directory, to {target}")
    return path


def parse_json_object(text: bytes, source: str) -> dict[str, Any]:
    """One JSON object from UTF-8 bytes.

    Args:
        text: the whole document.
        source: what to call it in a message.

    Raises:
        CheckpointError: not UTF-8, not strict JSON (NaN and Infinity included), not an object,
            nested too deeply, or a key that appears twice in one object.
    """

    def object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in pairs:
            if key in result:
                raise CheckpointError(
                    f"{source}: the name {shown(key)} appears twice in one object"
                )
            result[key] = value
        return result

    def refuse_constant(name: str) -> None:
        raise CheckpointError(f"{source}: {name} is not JSON")

    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=object_of, parse_constant=refuse_constant
        )
    except CheckpointError:
        raise
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{source}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise CheckpointError(f"{source}: nested too deeply") from error
    except ValueError as error:
        raise CheckpointError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: must be a JSON object, got {type(value).__name__}")
    return value


def read_json_object(directory: Path, name: str, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in file `name` of a model directory.

    Raises:
        CheckpointError: missing, outside the directory, over `max_bytes`, or not one strict JSON
            object.
    """
    path = contained_file(directory, name)
    size = path.stat().st_size
    if size > max_bytes:
        raise CheckpointError(f"{path}: size is {size} bytes, the limit is {max_bytes}")
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_json_object(text, str(path))


def shown(value: Any) -> str:
    """A value from a file, made safe and short enough to print."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
