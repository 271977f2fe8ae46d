import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.errors import CheckpointError
from tests.engine.checkpoint_samples import (
    NORM,
    SHAPES,
    opened,
    parts_of,
    refusal,
    sound_model,
    values_of,
    write,
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return sound_model(tmp_path)


def test_padding_and_metadata_in_the_header_are_accepted(tmp_path: Path):
    header, data = parts_of(list(SHAPES))
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode() + b"   "
    write(tmp_path / "model.safetensors", text, data)

    with opened(tmp_path) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor(NORM), values_of(NORM))


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (0, "header must be one JSON object"),
        (4 << 20, "the file is truncated"),
        ((4 << 20) + 1, f"header length is {(4 << 20) + 1}, the limit is {4 << 20}"),
        (2**64 - 1, f"header length is {2**64 - 1}, the limit is"),
    ],
)
def test_a_wrong_header_length_is_refused_with_the_number(tmp_path: Path, length, expected):
    write(tmp_path / "model.safetensors", *parts_of(list(SHAPES)), length=length)

    assert expected in refusal(tmp_path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100])
def test_a_truncated_header_is_refused_by_name(directory: Path, size):
    path = directory / "model.safetensors"
    os.truncate(path, size)

    message = refusal(directory)

    assert str(path) in message
    assert "needs at least 8" in message if size < 8 else "the file is truncated" in message


@pytest.mark.parametrize("missing_bytes", [1, 2, 128])
def test_truncated_data_is_refused_with_the_tensor_that_suffers(directory: Path, missing_bytes):
    path = directory / "model.safetensors"
    os.truncate(path, path.stat().st_size - missing_bytes)

    message = refusal(directory)

    assert NORM in message  # the last one
    assert "the file is truncated" in message


def test_bytes_after_the_last_tensor_are_refused(directory: Path):
    with (directory / "model.safetensors").open("ab") as file:
        file.write(b"\0")

    assert "the last tensor ends at byte" in refusal(directory)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (b"", "header must be one JSON object"),
        (b"[]", "header must be one JSON object"),
        (b" {}", "header must be one JSON object"),
        (b"{}\n", "header must be one JSON object"),
        (b"{}\0", "header must be one JSON object"),
        (b"{} {}", "not valid JSON"),
        (b'{"a" "b"}', "not valid JSON"),
        (b'{"\xff": 1}', "not UTF-8 at byte 2"),
        (b'{"a":' + b"[" * 50_000 + b"}", "nested too deeply"),
        (b'{"a": Infinity}', "Infinity is not JSON"),
        (b'{"a": 1}', "'a': must have dtype, shape and data_offsets"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__ must map strings to strings"),
        (b'{"__metadata__": []}', "__metadata__ must map strings to strings"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "'__metadata__' appears twice"),
    ],
)
def test_a_header_that_is_not_the_format_is_refused(tmp_path: Path, header, expected):
    write(tmp_path / "model.safetensors", header, b"")

    assert expected in refusal(tmp_path)


def test_a_name_that_appears_twice_is_refused_though_the_official_reader_accepts_it(tmp_path: Path):
    path = tmp_path / "model.safetensors"
    header, data = parts_of(list(SHAPES))
    twice = json.dumps(header)[:-1] + f', "{NORM}": {json.dumps(header[NORM])}}}'
    write(path, twice.encode(), data)

    with safetensors.safe_open(str(path), framework="numpy") as official:
        assert set(official.keys()) == set(SHAPES)
    assert f"{NORM!r} appears twice" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("dtype", "F16", "dtype must be BF16, got 'F16': convert the weights to bfloat16 first"),
        ("dtype", "F32", "dtype must be BF16, got 'F32'"),
        ("dtype", "F8_E4M3", "dtype must be BF16, got 'F8_E4M3'"),
        ("dtype", "U16", "dtype must be BF16, got 'U16'"),
        ("dtype", 16, "dtype must be BF16, got 16"),
        ("dtype", ["BF16"], "dtype must be BF16"),
        ("shape", [32], "data_offsets span 128 bytes, shape [32] needs 64"),
        ("shape", [65], "needs 130"),
        ("shape", [0], "needs 0"),
        ("shape", [-64], "shape must be"),
        ("shape", [64.0], "shape must be"),
        ("shape", [True] * 64, "shape must be"),
        ("shape", 64, "shape must be"),
        ("shape", [1] * 9, "shape must be at most 8 integers"),
        # The product is 2^64 + 64 and 0 in arithmetic that wraps.
        ("shape", [2**32, 2**32], f"needs {2**65}"),
        ("shape", [2**63], "shape must be at most 8 integers from 0 to 9223372036854775807"),
        ("shape", [10**4000], "shape must be"),
        ("shape", [64, 1], "shape must be [64] by the config, got [64, 1]"),
        ("data_offsets", [0], "data_offsets must be two"),
        ("data_offsets", [0, 64, 128], "data_offsets must be two"),
        ("data_offsets", [128, 0], "data_offsets must be two ascending"),
        ("data_offsets", [-128, 0], "data_offsets must be two"),
        ("data_offsets", [0.0, 128.0], "data_offsets must be two"),
        ("data_offsets", "0", "data_offsets must be two"),
        ("data_offsets", [2**62, 2**62 + 128], "the file is truncated"),
        ("data_offsets", [0, 128], "an overlap"),
        ("data_offsets", None, "data_offsets must be two"),
        ("shapes", [64], "must have dtype, shape and data_offsets and nothing else"),
    ],
)
def test_a_wrong_entry_is_refused_with_tensor_and_field(tmp_path: Path, field, value, expected):
    header, data = parts_of(list(SHAPES))
    header[NORM][field] = value
    write(tmp_path / "model.safetensors", header, data)

    message = refusal(tmp_path)

    assert NORM in message or "overlap" in message
    assert expected in message
    assert len(message) < 1000


def test_a_hole_between_tensors_is_refused(tmp_path: Path):
    header, data = parts_of(list(SHAPES))
    begin, end = header[NORM]["data_offsets"]
    header[NORM]["data_offsets"] = [begin + 8, end + 8]
    write(tmp_path / "model.safetensors", header, data + b"\0" * 8)

    assert "a hole" in refusal(tmp_path)


def test_two_tensors_on_the_same_bytes_are_refused(tmp_path: Path):
    header, data = parts_of(list(SHAPES))
    twin = "model.layers.0.post_attention_layernorm.weight"
    header[NORM]["data_offsets"] = header[twin]["data_offsets"]
    write(tmp_path / "model.safetensors", header, data[:-128])

    assert "an overlap" in refusal(tmp_path)


def test_an_empty_tensor_skips_no_check(tmp_path: Path):
    header, data = parts_of(list(SHAPES))
    header["empty"] = {"dtype": "BF16", "shape": [0, 2**62, 2**62], "data_offsets": [3, 3]}
    write(tmp_path / "model.safetensors", header, data)

    refusal(tmp_path)


@settings(
    derandomize=True,
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    edits=st.lists(
        st.tuples(st.integers(0, 1500), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4
    ),
    cut=st.integers(0, 3),
)
def test_a_mutated_file_is_refused_or_read_as_the_official_reader_reads_it(
    tmp_path: Path, edits, cut
):
    path = tmp_path / "model.safetensors"
    header, data = parts_of(list(SHAPES))
    write(path, header, data)
    content = bytearray(path.read_bytes())
    for position, patch in edits:
        content[position : position + len(patch)] = patch
    path.write_bytes(content[: len(content) - cut])

    try:
        checkpoint = opened(tmp_path)
    except CheckpointError:
        return

    with checkpoint, safetensors.safe_open(str(path), framework="numpy") as official:
        assert set(official.keys()) == set(SHAPES)
        for name in SHAPES:
            assert official.get_slice(name).get_shape() == list(checkpoint.tensor(name).shape)


def test_what_only_the_official_reader_refuses_is_refused(tmp_path: Path):
    header, data = parts_of(list(SHAPES))
    entry = {"dtype": "BF16", "shape": [0], "data_offsets": [len(data), len(data)]}
    # Python's JSON reader lets a lone surrogate pass; Rust's text cannot hold one.
    write(tmp_path / "model.safetensors", {**header, "\ud800": entry}, data)

    assert "refused by safetensors" in refusal(tmp_path)


def test_two_readers_that_disagree_are_an_error(directory: Path, monkeypatch: pytest.MonkeyPatch):
    other = directory / "other.safetensors"
    header, data = parts_of(list(SHAPES))
    header["renamed"] = header.pop(NORM)
    write(other, header, data)
    official = safetensors.safe_open
    monkeypatch.setattr(
        safetensors, "safe_open", lambda path, framework: official(str(other), framework)
    )

    assert "safetensors reads another header" in refusal(directory)
