"""A library whose every allocation has a guard at both ends, for tests of what writes past one.

Knows how it is linked (faults/guard_memory.c); what is run with it is the tests' affair. An engine
here has no more room than its step needs: what goes one row too far leaves its memory.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from engine.batch import Batch
from engine.bindings import DEVICES, Library
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.sampling import SequenceSampler, build_sampling
from engine.sampling_params import SamplingParams
from tests.kernels.sequences import Sequences
from tests.runtime.wrapped_twin import FAULTS, build_wrapped_twin

ROOT = Path(__file__).resolve().parents[2]
WRAPPED = ("twin_kernels", "cuda_kernels")
SOURCES = ("guard_memory.c", "call_with_nothing.c")
BLOCK_SIZE = 16
ONE = 0x3F80


class Guarded:
    """The library with guards, and what they saw.

    Args:
        path: as build_guarded_twin or link_guarded_library wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.library = Library(path)
        ffi = type(self.library.ffi)()
        ffi.cdef(
            "long guards_checked(void); long guards_broken(void); void guards_overrun(int does);"
            "int call_with_nothing(int is_cuda, const char **asked);"
        )
        self._ffi = ffi
        self._lib = ffi.dlopen(str(path))

    @property
    def counts(self) -> tuple[int, int]:
        """Allocations given back so far, and how many of them had a guard written to."""
        return self._lib.guards_checked(), self._lib.guards_broken()

    @contextmanager
    def watched(self) -> Iterator[None]:
        """A block in which memory is given back, and no guard broken."""
        checked, broken = self.counts
        yield
        assert self.counts[0] > checked, "nothing was given back: no guard was looked at"
        assert self.counts[1] == broken, "something wrote before or behind its array"

    def call_with_nothing(self, device: str) -> str:
        """Asks every operation for no row; the one that fails or writes all the same, or ""."""
        asked = self._ffi.new("char **")
        status = self._lib.call_with_nothing(DEVICES[device], asked)
        return self._ffi.string(asked[0]).decode() if status else ""

    @contextmanager
    def overrunning(self) -> Iterator[None]:
        """A block in which residual_add writes one value too many."""
        self._lib.guards_overrun(1)
        try:
            yield
        finally:
            self._lib.guards_overrun(0)


def build_guarded_twin(folder: Path) -> Guarded:
    """The CPU twin alone, compiled for this."""
    path = folder / "libguarded.so"
    build_wrapped_twin(path, SOURCES, WRAPPED)
    return Guarded(path)


def link_guarded_library(folder: Path) -> Guarded:
    """The library's own objects, its kernels among them, linked once more."""
    nvcc = os.environ.get("NVCC") or shutil.which("nvcc")
    if not nvcc:  # a library that was built elsewhere: device code is linked by nvcc alone
        pytest.skip("requires nvcc")
    path = folder / "libguarded.so"
    flags = ["-std=gnu11", "-O1", "-fPIC", "-fvisibility=hidden"]
    ours = [folder / f"{name}.o" for name in SOURCES]
    for name, target in zip(SOURCES, ours, strict=True):
        subprocess.run(["cc", *flags, "-c", FAULTS / name, "-o", target], check=True)
    objects = [
        each
        for each in sorted((ROOT / "build").rglob("*.o"))
        if (ROOT / "csrc" / each.relative_to(ROOT / "build")).with_suffix("").exists()
        and each.name != "no_cuda.c.o"
    ]
    wraps = [word for name in WRAPPED for word in ("-Xlinker", f"--wrap={name}")]
    link = [nvcc, "-shared", "-cudart", "static", *_library_folders(nvcc), "-Xcompiler", "-pthread"]
    link += ["-Xlinker", "--no-undefined", *wraps, "-o", path, *objects, *ours, "-lm"]
    subprocess.run(link, check=True)
    return Guarded(path)


def _library_folders(nvcc: str) -> list[str]:
    """A toolkit from PyPI keeps its libraries in lib, an installed one in lib64."""
    root = Path(nvcc).resolve().parents[1]
    return [f"-L{root / name}" for name in ("lib", "lib64")]


def decode_steps(library: Library, device: str, num_seqs: int) -> list[np.ndarray]:
    """Everything that a decode step, greedy ones and a sampled one of tight engines give."""
    lengths = (1 + np.arange(num_seqs) % (BLOCK_SIZE - 6)).tolist()
    found = []
    with _runner(library, device, num_seqs, num_blocks=num_seqs) as runner:
        sequences = Sequences(runner, lengths, growth=5, cached=ONE)
        batch = sequences.decode_step(range(num_seqs))
        found += [*vars(runner.forward(batch)).values()][:2]
        found.append(runner.engine.decode(batch, 4))
        found += _sampled(runner, batch, num_seqs)
    return found


def prefill_steps(library: Library, device: str, num_tokens: int) -> list[np.ndarray]:
    """The logits of a prompt in an engine that has room for it and no more."""
    with _runner(library, device, num_tokens, num_blocks=-(-num_tokens // BLOCK_SIZE)) as runner:
        sequences = Sequences(runner, [0], growth=num_tokens)
        output = runner.forward(sequences.step([0], [num_tokens], "all"))
        return [output.logits, output.next_ids]


def _runner(library: Library, device: str, num_tokens: int, num_blocks: int) -> ModelRunner:
    room = EngineConfig(
        device=device,
        block_size=BLOCK_SIZE,
        num_blocks=num_blocks,
        max_seq_len=-(-max(num_tokens, BLOCK_SIZE) // BLOCK_SIZE) * BLOCK_SIZE,
        max_num_tokens=num_tokens,
        max_num_seqs=num_tokens,
        num_threads=1,
    )
    return ModelRunner(resolve("toy-untied"), room, library)


def _sampled(runner: ModelRunner, batch: Batch, num_seqs: int) -> list[np.ndarray]:
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=5, repetition_penalty=1.3)
    states = [SequenceSampler(params, [1 + i % 200], i) for i in range(num_seqs)]
    output = runner.forward(batch, sampling=build_sampling(states))
    return [output.next_ids, *vars(output.logprobs).values()]
