"""The twin's answers from memory: those it gives itself, whatever was asked before."""

import functools
import inspect
from pathlib import Path

import numpy as np
import pytest

import engine.model_runner
from engine.batch import SequenceSlice, build_batch
from engine.bindings import Engine, Library, Tap, TapPoint
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops
from verification.mutants.build import ROOT
from verification.mutants.faults import GPU
from verification.teeth import remembered
from verification.teeth.__main__ import whole_plan
from verification.teeth.generate import GPU_MODEL
from verification.teeth.remembered import Memory, RememberedEngine, remembered_ops

ROOM = EngineConfig(
    device="cpu", block_size=16, num_blocks=8, max_seq_len=64, max_num_tokens=64, max_num_seqs=4
)
PROMPT = [5, 9, 2, 40, 17]


@pytest.fixture
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Memory:
    kept = Memory(tmp_path / "answers")
    engines = functools.partial(remembered._engine, kept)
    monkeypatch.setattr(engine.model_runner, "Engine", engines)
    return kept


def a_run(library: Library, last_token: int = 3) -> list[np.ndarray]:
    """Everything that the tests of a GPU ask of the twin."""
    found = []
    with ModelRunner(resolve("toy"), ROOM, library) as runner:
        runner.fill_blocks(range(8), 0x7FC1)
        batch = build_batch([SequenceSlice(PROMPT, 0, [3, 1])], 16, "all")
        tap = Tap(TapPoint.attn, 1, out=runner.tap_buffer(TapPoint.attn, batch))
        step = runner.forward(batch, [tap])
        found += [step.logits, step.next_ids, tap.out]
        batch = build_batch([SequenceSlice([last_token], len(PROMPT), [3, 1])], 16)
        logits = np.empty_like(step.logits[:1])
        found += [runner.engine.decode(batch, 4, logits), logits]
        found += runner.read_kv(0, np.arange(48, 53, dtype=np.int32))
    return found


def same(left: list[np.ndarray], right: list[np.ndarray]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(left, right, strict=True))


def test_a_second_run_has_every_answer_and_computes_none(
    library: Library, memory: Memory, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(engine.model_runner, "Engine", Engine)
    expected = a_run(library)
    monkeypatch.setattr(
        engine.model_runner, "Engine", functools.partial(remembered._engine, memory)
    )
    assert same(a_run(library), expected)

    monkeypatch.setattr(remembered, "Engine", None)

    assert same(a_run(library), expected)


def test_a_run_that_leaves_the_known_path_is_computed_behind_all_that_came_before(
    library: Library, memory: Memory
):
    a_run(library)
    other = a_run(library, last_token=11)
    again = a_run(library, last_token=11)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model_runner, "Engine", Engine)
        assert same(other, a_run(library, last_token=11))
    assert same(other, again)
    assert not same(other, a_run(library))


def test_what_is_not_kept_is_the_real_engines_and_so_is_what_follows(
    library: Library, memory: Memory
):
    a_run(library)
    with ModelRunner(resolve("toy"), ROOM, library) as runner:
        assert runner.engine.memory()["weights"] > 0
        batch = build_batch([SequenceSlice(PROMPT, 0, [3, 1])], 16, "all")
        step = runner.forward(batch)
        assert runner.engine._is_open

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.model_runner, "Engine", Engine)
        assert same([step.logits], a_run(library)[:1])


def test_an_engines_calls_are_all_known():
    # One that is added there has to be asked or left to the real one on purpose.
    known = set(vars(RememberedEngine)) | {"memory", "free_memory", "read_weight"}
    known |= {"forward_begin", "forward_end"}
    public = {name for name, _ in inspect.getmembers(Engine, inspect.isfunction)}
    assert {name for name in public if not name.startswith("_")} <= known
    # It takes Engine's place, so its parameters are Engine's; written out, for who reads it.
    for name, method in inspect.getmembers(RememberedEngine, inspect.isfunction):
        if name in public and not name.startswith("_"):
            expected = inspect.signature(getattr(Engine, name)).parameters
            assert list(inspect.signature(method).parameters) == list(expected), name


def test_operations_are_kept_by_their_inputs(library: Library, twin: Ops, tmp_path: Path):
    x, y = np.arange(64, dtype=np.uint16), np.arange(1, 65, dtype=np.uint16)
    memory = Memory(tmp_path)
    with remembered_ops(memory)(library) as ops:
        assert (ops.residual_add(x, y) == twin.residual_add(x, y)).all()
        assert (ops.residual_add(x, x) == twin.residual_add(x, x)).all()
    kept = sorted(tmp_path.iterdir())

    closed = remembered_ops(memory)(library)
    closed.close()

    assert len(kept) == 2
    assert (closed.residual_add(x, y) == twin.residual_add(x, y)).all()


def test_nothing_that_the_twin_runs_is_planted_for_a_gpu():
    files = {each.edit.file for each in whole_plan(ROOT, GPU, 200)}

    assert all(name.startswith("csrc/kernels/") or name in GPU_MODEL for name in files)
