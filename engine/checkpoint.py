"""Open the weights of a model directory, and hand out nothing that was not checked.

Decides which files hold the weights and what must be in them: exactly the tensors the config asks
for, each once, each of its shape. All checks are made in `open_checkpoint`, before any tensor is
handed out. Knows nothing of the header's format (`safetensors_file` does). NaN and Inf in weights
are legal; whoever loads them counts them.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.json_file import contained_file, read_json_object, shown
from engine.safetensors_file import (
    MAX_HEADER_BYTES,
    SafetensorsFile,
    TensorSpan,
    open_safetensors,
    read_header,
)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARDS = 1000
READERS = 2  # threads that read ahead; more only take memory's speed from the copies (docs/log.md)
AHEAD_BYTES = 1 << 28  # read and not yet handed out; one tensor may be more
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class Checkpoint:
    """The checked weights of one model; a context manager that owns the open files."""

    def __init__(self, shards: list[SafetensorsFile], spans: dict[str, TensorSpan]) -> None:
        """Take over open shards; use `open_checkpoint`."""
        self._shards = shards
        self._spans = spans

    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the order of `ModelConfig.weight_shapes`."""
        return tuple(self._spans)

    def tensor(self, name: str) -> np.ndarray:
        """One tensor, copied out of the file.

        Returns:
            bfloat16 bits as uint16, in the shape stored.

        Raises:
            CheckpointError: no such tensor, or the file changed since it was opened.
        """
        if name not in self._spans:
            raise CheckpointError(f"{shown(name)} is not a tensor of this checkpoint")
        span = self._spans[name]
        values = np.empty(span.shape, np.dtype("<u2"))
        span.file.check_unchanged()
        span.file.read(span.begin, memoryview(values.reshape(-1)).cast("B"))
        span.file.check_unchanged()
        return values

    @contextmanager
    def read_ahead(self) -> Iterator[Iterator[tuple[str, np.ndarray]]]:
        """Every tensor with its name, in the order of `names`, read by threads before it is wanted.

        Reading begins on entry: what is done before the first tensor is taken costs no time. Ends
        on exit, whether all were taken or not.

        Raises:
            CheckpointError: as `tensor`, when that tensor is taken.
        """
        with ThreadPoolExecutor(READERS) as readers:
            try:
                yield _ReadAhead(self, self._spans, readers)
            finally:
                readers.shutdown(cancel_futures=True)

    def num_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(span.num_bytes for span in self._spans.values())

    def sha256(self) -> str:
        """A hash of the weights alone, for provenance.

        Over each tensor in the order of `names`: name, shape and little-endian bytes. How the
        tensors are spread over files, and what else a header says, does not enter.

        Returns:
            64 hexadecimal digits.
        """
        digest = hashlib.sha256()
        for name, span in self._spans.items():
            digest.update(f"{name} {list(span.shape)}\n".encode())
            digest.update(memoryview(self.tensor(name).reshape(-1)).cast("B"))
        return digest.hexdigest()

    def close(self) -> None:
        """Close the files; further reads fail."""
        for shard in self._shards:
            shard.close()
        self._shards = []
        self._spans = {}

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the files."""
        self.close()


class _ReadAhead:
    """Tensors in order, as many read in advance as AHEAD_BYTES allow."""

    def __init__(
        self, checkpoint: Checkpoint, spans: dict[str, TensorSpan], readers: ThreadPoolExecutor
    ) -> None:
        self._checkpoint = checkpoint
        self._readers = readers
        self._unread = deque(spans.items())
        self._read: deque[tuple[str, int, Future[np.ndarray]]] = deque()
        self._ahead_bytes = 0  # of the tensors in _read
        self._advance()

    def _advance(self) -> None:
        while self._unread and (not self._read or self._ahead_bytes < AHEAD_BYTES):
            name, span = self._unread.popleft()
            self._read.append(
                (name, span.num_bytes, self._readers.submit(self._checkpoint.tensor, name))
            )
            self._ahead_bytes += span.num_bytes

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[str, np.ndarray]:
        if not self._read:
            raise StopIteration
        name, num_bytes, tensor = self._read.popleft()
        self._ahead_bytes -= num_bytes
        self._advance()
        return name, tensor.result()


def open_checkpoint(directory: str | Path, config: ModelConfig) -> Checkpoint:
    """The weights in a model directory, checked against the config.

    Where both `model.safetensors` and an index of shards exist, the single file is used, as
    transformers does.

    Args:
        directory: in Hugging Face form.
        config: says which tensors of which shapes must be there, no more and no fewer.

    Raises:
        CheckpointError: naming file, field, limit and value.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such model directory")
    shards: list[SafetensorsFile] = []
    spans: dict[str, TensorSpan] = {}
    try:
        for file_name, names in _weight_files(directory).items():
            shard = open_safetensors(contained_file(directory, file_name))
            shards.append(shard)
            found = read_header(shard)
            _check_shard_names(shard, found, names, spans)
            spans |= found
        return Checkpoint(shards, _in_config_order(directory, spans, config))
    except BaseException:
        for shard in shards:
            shard.close()
        raise


def _weight_files(directory: Path) -> dict[str, set[str] | None]:
    """Each safetensors file to open, with the names the index puts there (None: no index)."""
    if (directory / SINGLE_FILE).exists():
        return {SINGLE_FILE: None}
    if not (directory / INDEX_FILE).exists():
        pickles = sorted(
            path.name for path in directory.iterdir() if path.suffix in PICKLE_SUFFIXES
        )
        if pickles:
            raise CheckpointError(
                f"{directory}: {pickles[0]} is a pickle, which can run code; only safetensors "
                "files are read"
            )
        raise CheckpointError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there")

    index = directory / INDEX_FILE
    weight_map = read_json_object(directory, INDEX_FILE, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object that is not empty")
    files: dict[str, set[str] | None] = {}
    for name, file_name in weight_map.items():
        if not _is_plain_file_name(file_name):
            raise CheckpointError(
                f"{index}: weight_map[{shown(name)}] must name a .safetensors file of this "
                f"directory, got {shown(file_name)}"
            )
        names = files.setdefault(file_name, set())
        assert names is not None
        names.add(name)
    if len(files) > MAX_SHARDS:
        raise CheckpointError(f"{index}: {len(files)} shards, the limit is {MAX_SHARDS}")
    return files


def _is_plain_file_name(value: Any) -> bool:
    """A file name without any way out of the directory."""
    return (
        isinstance(value, str)
        and value.endswith(".safetensors")
        and not value.startswith(".")
        and not any(character in value for character in "/\\\0")
        and value.isprintable()
    )


def _check_shard_names(
    shard: SafetensorsFile,
    found: dict[str, TensorSpan],
    expected: set[str] | None,
    earlier: dict[str, TensorSpan],
) -> None:
    """Refuse a shard with other tensors than the index says, or with one of an earlier shard."""
    if expected is None:
        return
    for name in found:
        if name in earlier:
            raise CheckpointError(
                f"{shard.path}: {shown(name)} is also in {earlier[name].file.path.name}"
            )
        if name not in expected:
            raise CheckpointError(f"{shard.path}: {shown(name)} is not placed here by {INDEX_FILE}")
    for name in sorted(expected - set(found)):
        raise CheckpointError(f"{shard.path}: {shown(name)} should be here, says {INDEX_FILE}")


def _in_config_order(
    directory: Path, spans: dict[str, TensorSpan], config: ModelConfig
) -> dict[str, TensorSpan]:
    """The exact set of tensors the config asks for, with the shapes it gives them."""
    shapes = config.weight_shapes()
    for name, shape in shapes.items():
        if name not in spans:
            raise CheckpointError(f"{directory}: tensor {name!r} of shape {list(shape)} is missing")
        if spans[name].shape != shape:
            raise CheckpointError(
                f"{spans[name].file.path}: {name!r}: shape must be {list(shape)} by the config, "
                f"got {list(spans[name].shape)}"
            )
    for name in spans:
        if name not in shapes:
            tied = name == "lm_head.weight" and config.tie_word_embeddings
            reason = (
                "the config ties it to the embeddings" if tied else "the config has no such tensor"
            )
            raise CheckpointError(f"{spans[name].file.path}: {shown(name)} is unexpected: {reason}")
    return {name: spans[name] for name in shapes}
