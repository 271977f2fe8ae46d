"""Write a model directory in Hugging Face form: weights as a stream, the directory all or nothing.

Holds the byte layout of the safetensors file and the rule that a directory in the cache is complete
if it exists. Knows nothing of what the weights are.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CheckpointError

BF16_BYTES = 2
HEADER_ALIGNMENT = 8  # bytes: the data that follows starts aligned


def build_once(directory: Path, build: Callable[[Path], None]) -> Path:
    """The directory, built if it is not there.

    `build` fills a temporary neighbour, which then takes the name in one step: a killed or failed
    build leaves no directory, and of two processes that build at once one wins and both go on with
    its result.

    Raises:
        CheckpointError: the disk is full, the cache is read-only, or the like.
    """
    if directory.is_dir():
        return directory
    try:
        return _build(directory, build)
    except OSError as error:
        raise CheckpointError(
            f"{directory.name} cannot be made in {directory.parent}: {error}; models are kept "
            "where $TOUCHSTONE_CACHE says, and what is made on the way where $TMPDIR says"
        ) from error


def _build(directory: Path, build: Callable[[Path], None]) -> Path:
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
    try:
        build(scratch)
        scratch.chmod(0o755)
        try:
            scratch.rename(directory)
        except OSError:
            if not directory.is_dir():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return directory


def write_json(path: Path, value: dict[str, Any]) -> None:
    """One JSON object, indented, keys in the order given."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_safetensors(
    path: Path,
    shapes: dict[str, tuple[int, ...]],
    chunks_of: Callable[[str], Iterable[np.ndarray]],
    on_bytes: Callable[[int], None] = lambda count: None,
) -> None:
    """A safetensors file of bfloat16 tensors, never holding more than one chunk.

    The bytes depend on the arguments alone, so the file's hash can be pinned.

    Args:
        path: the file to create.
        shapes: tensor name -> shape; the data follows in this order.
        chunks_of: the values of one tensor in order, bfloat16 bits as uint16.
        on_bytes: told the size of each chunk after it was written.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for the format
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + BF16_BYTES * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        data_begin = file.tell()
        for name in shapes:
            for chunk in chunks_of(name):
                file.write(memoryview(np.ascontiguousarray(chunk, "<u2").reshape(-1)).cast("B"))
                on_bytes(chunk.nbytes)
            written = file.tell() - data_begin
            assert written == header[name]["data_offsets"][1], f"{name}: {written} bytes written"
        file.flush()
        os.fsync(file.fileno())
