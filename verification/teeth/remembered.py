"""The twin's answers, kept from one run of the GPU's tests for all that follow.

What is planted for a GPU lies in what the twin never runs, so what a test expects is the same with
every fault, and computing it takes most of a test's time. The first process that wants an answer
computes and keeps it, in files of one folder; all others read it. A call is known by everything the
twin was told before: an engine's answers are found again only behind the same calls in the same
order. Knows engine.ops and the engine's interface; knows nothing of tests.
"""

import functools
import hashlib
import inspect
import os
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import engine.model_runner
import engine.ops
from engine.batch import Batch
from engine.bindings import Engine, Library
from engine.config import EngineConfig, ModelConfig
from engine.sampling import Logprobs, SamplingBatch
from engine.tap import Tap


class Memory:
    """Answers by key, a file each.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Any:
        """What was kept, or None."""
        try:
            return pickle.loads((self._folder / key).read_bytes())
        except FileNotFoundError:
            return None

    def put(self, key: str, content: Any) -> None:
        """Keeps it, whole or not at all."""
        unfinished = self._folder / f"{key}.{os.getpid()}"
        unfinished.write_bytes(pickle.dumps(content))
        unfinished.replace(self._folder / key)


def remember_the_twin(memory: Memory) -> None:
    """From here on the twin's operations and engines of this process ask the memory first."""
    engine.ops.Ops = remembered_ops(memory)
    engine.model_runner.Engine = functools.partial(_engine, memory)


def remembered_ops(memory: Memory) -> type[engine.ops.Ops]:
    """The operations; those of the twin with a memory."""

    class RememberedOps(engine.ops.Ops):
        def __init__(self, library: Library, device: str = "cpu", num_threads: int = 0) -> None:
            super().__init__(library, device, num_threads)
            self._is_twin = device == "cpu"

    def remembered(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def asked(self: RememberedOps, *arguments: object, **named: object) -> Any:
            if not self._is_twin:
                return method(self, *arguments, **named)
            key = _digest(method.__name__, arguments, named)
            found = memory.get(key)
            if found is None:
                found = (method(self, *arguments, **named),)
                memory.put(key, found)
            return found[0]

        return asked

    for name, method in inspect.getmembers(engine.ops.Ops, inspect.isfunction):
        if not name.startswith("_") and name != "close":
            setattr(RememberedOps, name, remembered(method))
    return RememberedOps


def _engine(
    memory: Memory, library: Library, model_config: ModelConfig, engine_config: EngineConfig
) -> "Engine | RememberedEngine":
    if engine_config.device != "cpu":
        return Engine(library, model_config, engine_config)
    return RememberedEngine(memory, library, model_config, engine_config)


class RememberedEngine:
    """An engine of the twin that computes only what no earlier one with its history has.

    Calls that were answered from memory are kept, and made good when there is something to compute.
    """

    def __init__(
        self,
        memory: Memory,
        library: Library,
        model_config: ModelConfig,
        engine_config: EngineConfig,
    ) -> None:
        self.library = library
        self.config = model_config
        self.engine_config = engine_config
        self._memory = memory
        self._history = _digest("engine", model_config, engine_config)
        self._owed: list[tuple[str, bytes]] = []  # asked of the memory, not of the real one yet
        self._real: Engine | None = None
        self._is_open = False  # something unknown was asked of the real one: nothing is kept now

    def forward(
        self,
        batch: Batch,
        taps: Sequence[Tap] = (),
        logits: np.ndarray | None = None,
        next_ids: np.ndarray | None = None,
        sampling: SamplingBatch | None = None,
        logprobs: Logprobs | None = None,
    ) -> None:
        """Engine.forward."""
        scores = [] if logprobs is None else list(vars(logprobs).values())
        written = [*(tap.out for tap in taps), logits, next_ids, *scores]
        known = [batch, [(tap.point, tap.layer, tap.force) for tap in taps], sampling]
        arguments = (batch, taps, logits, next_ids, sampling, logprobs)
        self._ask("forward", arguments, known, written)

    def decode(self, batch: Batch, num_steps: int, logits: np.ndarray | None = None) -> np.ndarray:
        """Engine.decode."""
        return self._ask("decode", (batch, num_steps, logits), [batch, num_steps], [logits])

    def load_weight(self, name: str, array: np.ndarray) -> int:
        """Engine.load_weight."""
        return self._ask("load_weight", (name, np.asarray(array)))

    def finish_loading(self) -> None:
        """Engine.finish_loading."""
        self._ask("finish_loading", ())

    def tap_shape(self, point: object) -> tuple[int, np.dtype]:
        """Engine.tap_shape."""
        return self._ask("tap_shape", (point,))

    def read_kv(self, layer: int, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Engine.read_kv."""
        return self._ask("read_kv", (layer, np.asarray(slots)))

    def fill_blocks(self, block_ids: Sequence[int], value: int) -> None:
        """Engine.fill_blocks."""
        self._ask("fill_blocks", (np.asarray(block_ids, np.int32), value))

    def close(self) -> None:
        """Engine.close."""
        if self._real is not None:
            self._real.close()

    def __getattr__(self, name: str) -> Any:
        """Whatever else an engine has is the real one's, and so is all that follows."""
        real = self._caught_up()
        self._is_open = True
        return getattr(real, name)

    def _ask(
        self,
        name: str,
        arguments: tuple[Any, ...],
        known: Sequence[Any] | None = None,
        written: Sequence[np.ndarray | None] = (),
    ) -> Any:
        """A call's result.

        Args:
            known: what it depends on; None: its arguments.
            written: the arrays that it fills, by their places.
        """
        if self._is_open:
            return getattr(self._real, name)(*arguments)
        shapes = [None if out is None else (out.shape, out.dtype.str) for out in written]
        known = arguments if known is None else known
        self._history = _digest(self._history, name, known, shapes)
        filled = [out for out in written if out is not None]
        found = self._memory.get(self._history)
        if found is None:
            result = getattr(self._caught_up(), name)(*arguments)
            self._memory.put(self._history, (result, filled))
            return result
        self._owed.append((name, pickle.dumps(arguments)))
        result, values = found
        for out, value in zip(filled, values, strict=True):
            out[...] = value
        return result

    def _caught_up(self) -> Engine:
        """The real engine, told everything that this one was."""
        if self._real is None:
            self._real = Engine(self.library, self.config, self.engine_config)
        for name, arguments in self._owed:
            getattr(self._real, name)(*pickle.loads(arguments))
        self._owed.clear()
        return self._real


def _digest(*facts: object) -> str:
    return hashlib.blake2b(pickle.dumps(facts), digest_size=20).hexdigest()
