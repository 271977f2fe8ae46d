"""One safetensors file: open it, check every word of its header, read a tensor's bytes.

Holds the rules of the format, as the official reader and as this module read it, and stricter ones
of ours: bfloat16 only, no name twice, a small header. Bytes are read from a descriptor that stays
open, never mapped: a file that shrinks under a map kills the process, a short read is an error with
a name. Knows nothing of models.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from engine.errors import CheckpointError
from engine.json_file import parse_json_object, shown

MAX_HEADER_BYTES = 4 << 20  # Llama 3.2 1B needs 16 KB; the format itself allows 100 MB
LENGTH_BYTES = 8  # the header's length, little-endian, before the header
BF16_BYTES = 2
MAX_DIMENSIONS = 8  # a model has vectors and matrices; the bound keeps products and messages short
MAX_COUNT = 2**63 - 1
OTHER_PRECISIONS = ("F16", "F32", "F64")  # honest weights: the message says how to go on


@dataclass(frozen=True)
class TensorSpan:
    """Where one tensor's bytes lie."""

    file: "SafetensorsFile"
    shape: tuple[int, ...]
    begin: int  # byte offset in the file
    num_bytes: int


@dataclass(frozen=True)
class SafetensorsFile:
    """One open file, and what it was when it was checked."""

    path: Path
    descriptor: int
    size: int  # bytes
    modified_ns: int

    def read(self, begin: int, out: memoryview) -> None:
        """Fill `out` from byte `begin`, or say which file fell short."""
        done = 0
        while done < len(out):
            try:
                count = os.preadv(self.descriptor, [out[done:]], begin + done)
            except OSError as error:
                raise CheckpointError(f"{self.path}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise CheckpointError(
                    f"{self.path}: {len(out)} bytes were wanted at {begin}, {done} are left: "
                    "the file shrank"
                )
            done += count

    def close(self) -> None:
        """Close the descriptor."""
        os.close(self.descriptor)

    def check_unchanged(self) -> None:
        """Refuse a file that was written to since it was checked."""
        now = os.fstat(self.descriptor)
        if (now.st_size, now.st_mtime_ns) != (self.size, self.modified_ns):
            raise CheckpointError(
                f"{self.path}: changed while open: size was {self.size} bytes, is {now.st_size}"
            )


def open_safetensors(path: Path) -> SafetensorsFile:
    """Open a file for `read_header`; the caller closes it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be opened: {error.strerror}") from error
    status = os.fstat(descriptor)
    return SafetensorsFile(path, descriptor, status.st_size, status.st_mtime_ns)


def read_header(file: SafetensorsFile) -> dict[str, TensorSpan]:
    """Every tensor of one file, after all checks that need no config."""
    path = file.path
    if file.size < LENGTH_BYTES:
        raise CheckpointError(
            f"{path}: size is {file.size} bytes, a header needs at least {LENGTH_BYTES}"
        )
    length_field = bytearray(LENGTH_BYTES)
    file.read(0, memoryview(length_field))
    header_bytes = int.from_bytes(length_field, "little")
    if header_bytes > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: header length is {header_bytes}, the limit is {MAX_HEADER_BYTES}"
        )
    if LENGTH_BYTES + header_bytes > file.size:
        raise CheckpointError(
            f"{path}: header length is {header_bytes}, but only {file.size - LENGTH_BYTES} bytes "
            "follow: the file is truncated"
        )
    text = bytearray(header_bytes)
    file.read(LENGTH_BYTES, memoryview(text))
    if not text.startswith(b"{") or not text.rstrip(b" ").endswith(b"}"):
        raise CheckpointError(f"{path}: header must be one JSON object, padded with spaces only")
    header = parse_json_object(bytes(text), f"{path}: header")
    _check_metadata(path, header.pop("__metadata__", {}))

    data_begin = LENGTH_BYTES + header_bytes
    spans = {name: _span(file, name, entry, data_begin) for name, entry in header.items()}
    _check_contiguous(file, spans, data_begin)
    _check_with_official_reader(file, spans)
    return spans


def _check_metadata(path: Path, metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        raise CheckpointError(f"{path}: __metadata__ must map strings to strings")


def _span(file: SafetensorsFile, name: str, entry: Any, data_begin: int) -> TensorSpan:
    """One entry of the header, checked on its own."""
    where = f"{file.path}: {shown(name)}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have dtype, shape and data_offsets and nothing else")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype != "BF16":
        hint = ": convert the weights to bfloat16 first" if dtype in OTHER_PRECISIONS else ""
        raise CheckpointError(f"{where}: dtype must be BF16, got {shown(dtype)}{hint}")
    if not _are_counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise CheckpointError(
            f"{where}: shape must be at most {MAX_DIMENSIONS} integers from 0 to {MAX_COUNT}, "
            f"got {shown(shape)}"
        )
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where}: data_offsets must be two ascending integers from 0 to {MAX_COUNT}, "
            f"got {shown(offsets)}"
        )
    num_values = 1
    for extent in shape:
        num_values *= extent  # Python's integers do not wrap
    begin, end = offsets
    if end - begin != num_values * BF16_BYTES:
        raise CheckpointError(
            f"{where}: data_offsets span {end - begin} bytes, shape {shape} needs "
            f"{num_values * BF16_BYTES}"
        )
    if data_begin + end > file.size:
        raise CheckpointError(
            f"{where}: data_offsets end at byte {data_begin + end} of the file, which has "
            f"{file.size}: the file is truncated"
        )
    return TensorSpan(file, tuple(shape), data_begin + begin, end - begin)


def _check_contiguous(file: SafetensorsFile, spans: dict[str, TensorSpan], data_begin: int) -> None:
    """Refuse holes, overlaps and bytes that belong to no tensor."""
    position = data_begin
    for name, span in sorted(spans.items(), key=lambda item: (item[1].begin, item[1].num_bytes)):
        if span.begin != position:
            kind = "a hole" if span.begin > position else "an overlap"
            raise CheckpointError(
                f"{file.path}: {shown(name)}: data_offsets begin at byte {span.begin} of the "
                f"file, must be {position}: {kind}"
            )
        position = span.begin + span.num_bytes
    if position != file.size:
        raise CheckpointError(
            f"{file.path}: the last tensor ends at byte {position}, but the file has {file.size}"
        )


def _check_with_official_reader(file: SafetensorsFile, spans: dict[str, TensorSpan]) -> None:
    """Refuse a file that the official reader refuses, or reads differently."""
    try:
        # By path: were it another file by now, the bytes still come from the checked descriptor.
        with safetensors.safe_open(str(file.path), framework="numpy") as official:
            ordered = list(official.offset_keys())
            read = {
                name: (tuple(piece.get_shape()), piece.get_dtype())
                for name, piece in ((name, official.get_slice(name)) for name in ordered)
            }
    except Exception as error:  # the extension raises its own kind and, for I/O, several others
        raise CheckpointError(f"{file.path}: refused by safetensors: {error}") from error
    ours = sorted(spans, key=lambda name: (spans[name].begin, spans[name].num_bytes))
    if read != {name: (span.shape, "BF16") for name, span in spans.items()} or not _same_order(
        spans, ordered, ours
    ):
        raise CheckpointError(f"{file.path}: safetensors reads another header than this engine")
    file.check_unchanged()


def _same_order(spans: dict[str, TensorSpan], left: list[str], right: list[str]) -> bool:
    """Whether two orders put the tensors at the same bytes; empty tensors may trade places."""
    return [spans[name].begin for name in left] == [spans[name].begin for name in right]


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(item, int) and not isinstance(item, bool) and 0 <= item <= MAX_COUNT
        for item in value
    )
