"""A directory becomes a loaded engine, or nothing."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Engine, Library, TapPoint
from engine.checkpoint import open_checkpoint
from engine.config import EngineConfig
from engine.errors import CheckpointError, InvalidArgument
from engine.model_runner import ModelRunner
from engine.models import resolve
from tests.twin.bits import assert_same_bits

ROOM = EngineConfig(
    "cpu", num_blocks=4, max_seq_len=64, max_num_tokens=16, max_num_seqs=2, block_size=16
)


@pytest.mark.parametrize("name", ["toy", "toy-untied"])
def test_every_tensor_of_the_directory_is_in_the_engine(library: Library, name: str):
    with (
        ModelRunner(resolve(name), ROOM, library) as runner,
        open_checkpoint(resolve(name), runner.config) as checkpoint,
    ):
        for tensor in checkpoint.names():
            assert_same_bits(runner.engine.read_weight(tensor), checkpoint.tensor(tensor))


def test_progress_is_told_once_per_tensor(library: Library):
    told: list[tuple[int, int, str]] = []

    with ModelRunner(resolve("toy"), ROOM, library, lambda *args: told.append(args)) as runner:
        names = list(runner.config.weight_shapes())

    assert [done for done, _, _ in told] == list(range(1, len(names) + 1))
    assert {total for _, total, _ in told} == {len(names)}
    assert sorted(name for _, _, name in told) == sorted(names)


def test_a_step_gives_logits_and_ids_of_the_wanted_rows(make_runner):
    runner = make_runner()
    slices = [SequenceSlice([1, 2, 3], 0, [0]), SequenceSlice([4], 0, [1])]

    for wanted, count in (("last", 2), ("all", 4), ("none", 0)):
        output = runner.forward(build_batch(slices, 16, wanted))
        assert output.logits.shape == (count, 320) and output.logits.dtype == np.float32
        assert output.next_ids.shape == (count,) and output.next_ids.dtype == np.int32
        assert (output.next_ids == output.logits.argmax(-1)).all()


def test_tap_buffers_fit_their_taps(make_runner):
    runner = make_runner()
    batch = build_batch([SequenceSlice([1, 2, 3], 0, [0])], 16)

    assert runner.tap_buffer(TapPoint.gate, batch).shape == (3, 320)
    assert runner.tap_buffer(TapPoint.final_norm, batch).shape == (1, 128)
    assert runner.tap_buffer(TapPoint.logits, batch).dtype == np.float32


def test_a_failure_while_loading_closes_the_engine(
    library: Library, monkeypatch: pytest.MonkeyPatch
):
    closed: list[Engine] = []
    close = Engine.close
    monkeypatch.setattr(Engine, "close", lambda self: (closed.append(self), close(self))[1])

    def stop(done: int, total: int, name: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ModelRunner(resolve("toy"), ROOM, library, stop)

    assert len(closed) == 1


def test_a_directory_that_disagrees_with_its_config_is_refused(library: Library, tmp_path: Path):
    shutil.copytree(resolve("toy"), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["intermediate_size"] = 384
    path.write_text(json.dumps(config))

    with pytest.raises(CheckpointError, match="mlp"):
        ModelRunner(tmp_path / "model", ROOM, library)


def test_a_missing_directory_is_refused(library: Library, tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere"):
        ModelRunner(tmp_path / "nowhere", ROOM, library)


def test_not_finite_weights_are_counted_by_name(library: Library, tmp_path: Path):
    from safetensors.numpy import save_file

    source = resolve("toy")
    shutil.copytree(source, tmp_path / "model")
    with ModelRunner(source, ROOM, library) as runner:
        assert runner.not_finite == {}
        config = runner.config
    import ml_dtypes

    with open_checkpoint(source, config) as checkpoint:
        tensors = {name: checkpoint.tensor(name).copy() for name in checkpoint.names()}
    tensors["model.layers.1.mlp.up_proj.weight"][0, :3] = [0x7F80, 0x7FC0, 0xFF80]
    (tmp_path / "model" / "model.safetensors").unlink()
    as_bf16 = {name: values.view(ml_dtypes.bfloat16) for name, values in tensors.items()}
    save_file(as_bf16, tmp_path / "model" / "model.safetensors")

    with ModelRunner(tmp_path / "model", ROOM, library) as runner:
        assert runner.not_finite == {"model.layers.1.mlp.up_proj.weight": 3}


def test_a_closed_runner_refuses_steps(library: Library):
    runner = ModelRunner(resolve("toy"), ROOM, library)
    runner.close()
    runner.close()

    with pytest.raises(InvalidArgument, match="closed"):
        runner.forward(build_batch([SequenceSlice([1], 0, [0])], 16))


def test_who_leaves_the_block_leaves_a_closed_engine(library: Library):
    with ModelRunner(resolve("toy"), ROOM, library) as runner:
        pass

    with pytest.raises(InvalidArgument, match="closed"):
        runner.fill_blocks([0], 0)
