import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import engine.checkpoint
from engine.checkpoint import Checkpoint
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


def test_every_tensor_comes_back_bit_for_bit_in_the_order_of_the_config(directory: Path):
    with opened(directory) as checkpoint:
        assert checkpoint.names() == tuple(SHAPES)
        for name, shape in SHAPES.items():
            tensor = checkpoint.tensor(name)
            assert tensor.dtype == np.uint16
            assert tensor.shape == shape
            np.testing.assert_array_equal(tensor, values_of(name))
        assert checkpoint.num_bytes() == sum(values_of(name).nbytes for name in SHAPES)


def test_a_file_of_the_official_writer_is_read_bit_for_bit(tmp_path: Path):
    import ml_dtypes
    from safetensors.numpy import save_file

    save_file(
        {name: values_of(name).view(ml_dtypes.bfloat16) for name in SHAPES},
        tmp_path / "model.safetensors",
        metadata={"format": "pt"},
    )

    with opened(tmp_path) as checkpoint:
        for name in SHAPES:
            np.testing.assert_array_equal(checkpoint.tensor(name), values_of(name))


def test_a_name_that_is_no_tensor_is_refused(directory: Path):
    with opened(directory) as checkpoint, pytest.raises(CheckpointError, match="'lm_head.weight'"):
        checkpoint.tensor("lm_head.weight")


def test_a_closed_checkpoint_hands_out_nothing(directory: Path):
    checkpoint = opened(directory)
    checkpoint.close()
    checkpoint.close()

    with pytest.raises(CheckpointError):
        checkpoint.tensor(NORM)


def test_a_missing_tensor_is_refused_by_name_and_shape(tmp_path: Path):
    names = [name for name in SHAPES if name != NORM]
    write(tmp_path / "model.safetensors", *parts_of(names))

    assert f"tensor {NORM!r} of shape [64] is missing" in refusal(tmp_path)


@pytest.mark.parametrize("name", [name for name in SHAPES if len(SHAPES[name]) == 2])
def test_a_tensor_of_another_shape_and_as_many_values_is_refused_by_name(tmp_path: Path, name: str):
    # as many bytes, so that nothing but the shape can tell: a transposed weight, say
    rows, columns = SHAPES[name]
    other = [columns, rows] if rows != columns else [rows // 2, columns * 2]
    header, data = parts_of(list(SHAPES))
    header[name]["shape"] = other
    write(tmp_path / "model.safetensors", header, data)

    message = refusal(tmp_path)

    assert f"{name!r}: shape must be [{rows}, {columns}] by the config" in message
    assert f"got {other}" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("lm_head.weight", "the config ties it to the embeddings"),
        ("model.layers.1.input_layernorm.weight", "the config has no such tensor"),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", "the config has no such tensor"),
        ("x" * 500, "the config has no such tensor"),
    ],
)
def test_a_tensor_that_the_config_does_not_have_is_refused_by_name(tmp_path: Path, name, reason):
    header, data = parts_of(list(SHAPES))
    entry = {"dtype": "BF16", "shape": [1], "data_offsets": [len(data), len(data) + 2]}
    write(tmp_path / "model.safetensors", {**header, name: entry}, data + b"\0\0")

    message = refusal(tmp_path)

    assert reason in message
    assert name[:100] in message
    assert len(message) < 1000


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth"])
def test_a_directory_of_pickles_is_refused_unread(tmp_path: Path, suffix):
    (tmp_path / f"pytorch_model{suffix}").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")

    message = refusal(tmp_path)

    assert f"pytorch_model{suffix} is a pickle" in message


def test_a_directory_without_weights_is_refused(tmp_path: Path):
    assert "neither model.safetensors nor" in refusal(tmp_path)


def test_a_missing_directory_is_refused(tmp_path: Path):
    assert "no such model directory" in refusal(tmp_path / "nowhere")


def test_weights_linked_from_outside_the_directory_are_refused(directory: Path, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").symlink_to(directory / "model.safetensors")

    assert "link out of the model directory" in refusal(model)


def test_a_snapshot_of_the_hub_cache_may_link_to_its_own_blobs(directory: Path, tmp_path: Path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (directory / "model.safetensors").rename(blobs / "0123")
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs/0123"))

    with opened(snapshot) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor(NORM), values_of(NORM))


def test_weights_that_are_a_directory_or_a_pipe_are_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "model.safetensors")  # opening it would wait for ever

    assert "no such file" in refusal(tmp_path)


def test_a_file_that_shrinks_while_open_is_an_error_and_no_crash(directory: Path):
    with opened(directory) as checkpoint:
        os.truncate(directory / "model.safetensors", 5000)

        with pytest.raises(CheckpointError, match="changed while open: size was .* is 5000"):
            checkpoint.tensor(NORM)


def test_a_file_that_is_written_to_while_open_is_an_error(directory: Path):
    path = directory / "model.safetensors"
    with opened(directory) as checkpoint:
        with path.open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            file.write(b"\1\2")
        os.utime(path, ns=(0, 0))  # a clock too coarse to see the write is not what is tested

        with pytest.raises(CheckpointError, match="changed while open"):
            checkpoint.tensor(NORM)


def test_a_file_that_is_replaced_while_open_changes_nothing(directory: Path):
    with opened(directory) as checkpoint:
        os.replace(directory / "model.safetensors", directory / "old")
        (directory / "model.safetensors").write_bytes(b"another")

        np.testing.assert_array_equal(checkpoint.tensor(NORM), values_of(NORM))


class TestReadAhead:
    def test_every_tensor_comes_in_order_bit_for_bit(self, directory: Path):
        with opened(directory) as checkpoint, checkpoint.read_ahead() as tensors:
            read = list(tensors)

        assert [name for name, _ in read] == list(SHAPES)
        for name, values in read:
            assert values.shape == SHAPES[name]
            np.testing.assert_array_equal(values, values_of(name))

    # The smallest tensor has 128 bytes, the largest 8192.
    @pytest.mark.parametrize("ahead", [1, 128, 9000, 1 << 20])
    def test_no_more_is_read_than_may_lie_in_memory(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch, ahead: int
    ):
        monkeypatch.setattr(engine.checkpoint, "AHEAD_BYTES", ahead)
        begun: list[str] = []
        tensor = Checkpoint.tensor
        monkeypatch.setattr(
            Checkpoint, "tensor", lambda self, name: (begun.append(name), tensor(self, name))[1]
        )
        sizes = [values_of(name).nbytes for name in SHAPES]

        with opened(directory) as checkpoint, checkpoint.read_ahead() as tensors:
            for taken in range(1, len(sizes) + 1):
                next(tensors)
                # The last one may reach over the limit, and is not counted.
                assert sum(sizes[taken : len(begun)][:-1]) < max(ahead, 1)

        assert sorted(begun) == sorted(SHAPES)

    def test_reading_begins_before_the_first_is_taken(
        self, directory: Path, monkeypatch: pytest.MonkeyPatch
    ):
        has_begun = threading.Event()
        tensor = Checkpoint.tensor
        monkeypatch.setattr(
            Checkpoint, "tensor", lambda self, name: (has_begun.set(), tensor(self, name))[1]
        )

        with opened(directory) as checkpoint, checkpoint.read_ahead():
            assert has_begun.wait(10)

    def test_a_tensor_that_cannot_be_read_is_an_error_when_it_is_taken(self, directory: Path):
        with opened(directory) as checkpoint:
            os.truncate(directory / "model.safetensors", 5000)

            with checkpoint.read_ahead() as tensors, pytest.raises(CheckpointError, match="5000"):
                list(tensors)

    def test_leaving_early_leaves_no_thread(self, directory: Path):
        before = set(threading.enumerate())

        with opened(directory) as checkpoint:
            with pytest.raises(KeyboardInterrupt), checkpoint.read_ahead() as tensors:
                next(tensors)
                raise KeyboardInterrupt

            assert set(threading.enumerate()) <= before


class TestShards:
    FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

    @pytest.fixture
    def weight_map(self) -> dict[str, str]:
        names = list(SHAPES)
        return {name: self.FIRST if name in names[:4] else self.SECOND for name in names}

    def build(self, directory: Path, weight_map: dict[str, Any]) -> Path:
        """The two files as they should be, and this index."""
        names = list(SHAPES)
        write(directory / self.FIRST, *parts_of(names[:4]))
        write(directory / self.SECOND, *parts_of(names[4:]))
        index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        return directory

    def test_shards_give_the_tensors_and_the_hash_of_a_single_file(
        self, tmp_path: Path, weight_map, directory: Path
    ):
        with opened(directory) as single:
            expected = single.sha256()
        (tmp_path / "sharded").mkdir()

        with opened(self.build(tmp_path / "sharded", weight_map)) as checkpoint:
            assert checkpoint.names() == tuple(SHAPES)
            for name in SHAPES:
                np.testing.assert_array_equal(checkpoint.tensor(name), values_of(name))
            assert checkpoint.sha256() == expected

    def test_a_single_file_wins_over_an_index_as_in_transformers(self, tmp_path: Path, weight_map):
        self.build(tmp_path, weight_map)
        header, data = parts_of(list(SHAPES))
        write(tmp_path / "model.safetensors", header, b"\0" * len(data))

        with opened(tmp_path) as checkpoint:
            assert not checkpoint.tensor(NORM).any()

    @pytest.mark.parametrize(
        "file_name",
        [
            "../model-00001-of-00002.safetensors",
            "/etc/passwd.safetensors",
            "sub/model.safetensors",
            "sub\\model.safetensors",
            ".hidden.safetensors",
            "model\0.safetensors",
            "model\n.safetensors",
            "model.bin",
            "",
            None,
            7,
        ],
    )
    def test_an_index_that_points_anywhere_else_is_refused(
        self, tmp_path: Path, weight_map, file_name
    ):
        self.build(tmp_path, {**weight_map, NORM: file_name})

        message = refusal(tmp_path)

        assert f"weight_map['{NORM}'] must name a .safetensors file of this directory" in message

    def test_a_shard_that_is_not_there_is_refused_by_name(self, tmp_path: Path, weight_map):
        self.build(tmp_path, weight_map)
        (tmp_path / self.SECOND).unlink()

        assert f"{self.SECOND}: no such file" in refusal(tmp_path)

    def test_a_tensor_in_two_shards_is_refused(self, tmp_path: Path, weight_map):
        self.build(tmp_path, weight_map)
        write(tmp_path / self.SECOND, *parts_of(list(SHAPES)[3:]))

        assert f"is also in {self.FIRST}" in refusal(tmp_path)

    def test_a_tensor_in_another_shard_than_the_index_says_is_refused(
        self, tmp_path: Path, weight_map
    ):
        self.build(tmp_path, {**weight_map, NORM: self.FIRST})

        assert f"{NORM!r} should be here" in refusal(tmp_path)

    def test_a_tensor_that_the_index_does_not_know_is_refused(self, tmp_path: Path, weight_map):
        self.build(tmp_path, {name: file for name, file in weight_map.items() if name != NORM})

        assert f"{NORM!r} is not placed here" in refusal(tmp_path)

    @pytest.mark.parametrize("value", [{}, [], None, "model.safetensors"])
    def test_an_index_without_a_map_is_refused(self, tmp_path: Path, value):
        self.build(tmp_path, value)

        assert "weight_map must be an object that is not empty" in refusal(tmp_path)

    def test_an_index_with_a_name_twice_is_refused(self, tmp_path: Path, weight_map):
        self.build(tmp_path, weight_map)
        text = json.dumps({"weight_map": weight_map})
        text = text.replace("{", "{", 1)[:-2] + f', "{NORM}": "{self.FIRST}"}}}}'
        (tmp_path / "model.safetensors.index.json").write_text(text)

        assert f"{NORM!r} appears twice" in refusal(tmp_path)


def test_the_hash_depends_on_every_bit_and_on_nothing_but_the_weights(tmp_path: Path):
    def sha256(name: str, metadata: dict[str, Any], changed: int | None) -> str:
        directory = tmp_path / name
        directory.mkdir()
        header, data = parts_of(list(SHAPES))
        bits = bytearray(data)
        if changed is not None:
            bits[changed] ^= 1
        write(directory / "model.safetensors", {**metadata, **header}, bytes(bits))
        with opened(directory) as checkpoint:
            return checkpoint.sha256()

    plain = sha256("plain", {}, None)

    assert sha256("metadata", {"__metadata__": {"who": "me"}}, None) == plain
    assert sha256("first", {}, 0) != plain
    assert sha256("last", {}, -1) != plain
