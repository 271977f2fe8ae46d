"""Every CUDA call of an engine's life made to fail in turn: a typed error, no leak, usable or dead.

The real launchers and the real runtime of csrc/, linked to a CUDA runtime without a device
(faults/fake_cuda.c) and with the host's allocator counted (faults/fail_nth_allocation.c). Kernels
compute nothing here: that the next engine gives the same bits is for tests/kernels on a GPU.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Engine, Library
from engine.config import EngineConfig, ModelConfig
from engine.errors import (
    DeviceFailed,
    DeviceUnavailable,
    EngineError,
    OutOfMemory,
)
from engine.models import resolve
from engine.ops import Ops
from tests.runtime.test_out_of_memory import WRAPPED
from tests.twin import sampling_contract as page

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).parent / "faults"
OUT_OF_MEMORY, OLD_DRIVER, NO_DEVICE, LAUNCH_FAILED = 2, 35, 100, 719  # cudaError_t
ROOM = EngineConfig(
    "cuda",
    num_blocks=8,
    block_size=16,
    max_seq_len=64,
    max_num_tokens=48,
    max_num_seqs=12,
    num_threads=0,
)


class Faulty:
    """The library over the made-up runtime."""

    def __init__(self, path: Path) -> None:
        self.library = Library(path)
        self._ffi = type(self.library.ffi)()
        self._ffi.cdef(
            "void cuda_faults_arm(long n, int code, int sticky); long cuda_faults_calls(void);"
            "long cuda_faults_live(void); const char *cuda_faults_failed(void);"
            "void cuda_faults_fill(int value); void cuda_faults_driver(int version);"
            "void faults_fail_allocation(long n); long faults_live(void);"
        )
        self._lib = self._ffi.dlopen(str(path))
        self._lib.faults_fail_allocation(0)

    def arm(self, n: int | None, code: int = LAUNCH_FAILED, sticky: bool = False) -> None:
        """The n-th call from now on fails, counted from 1, or none does; counts anew."""
        self._lib.cuda_faults_arm(n or 0, code, int(sticky))

    def fill(self, value: int) -> None:
        """What every byte of new device memory holds; the default is 0."""
        self._lib.cuda_faults_fill(value)

    def driver(self, version: int) -> None:
        """The driver's; 0: there is none. The default is one that is new enough."""
        self._lib.cuda_faults_driver(version)

    @property
    def calls(self) -> int:
        return self._lib.cuda_faults_calls()

    @property
    def live(self) -> tuple[int, int]:
        """Device allocations and streams, and host allocations, given out and not yet back."""
        return self._lib.cuda_faults_live(), self._lib.faults_live()

    @property
    def failed(self) -> str:
        """The call that was made to fail; empty if it was never reached."""
        return self._ffi.string(self._lib.cuda_faults_failed()).decode()


def toolkit_include() -> Path | None:
    """Where cuda_runtime_api.h is, by the nvcc that built the library."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False)
    tops = [line.split("=")[1] for line in told.stderr.splitlines() if line.startswith("#$ TOP=")]
    include = Path(tops[0].strip()) / "include" if tops else None
    return include if include and (include / "cuda_runtime_api.h").exists() else None


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, library: Library) -> Faulty:
    include = toolkit_include()
    if not library.has_cuda or include is None or shutil.which("c++") is None:
        pytest.skip("requires a library built with nvcc, the toolkit's headers and c++")
    folder = tmp_path_factory.mktemp("cuda_faults")
    fakes = []
    for name in ("fake_cuda", "fail_nth_allocation"):
        fakes.append(folder / f"{name}.o")
        flags = ["-std=gnu11", "-O1", "-fPIC", "-fvisibility=hidden", f"-I{include}"]
        source = FAULTS / f"{name}.c"
        subprocess.run(["cc", *flags, "-c", source, "-o", fakes[-1]], check=True)
    objects = [
        path
        for path in sorted((ROOT / "build").rglob("*.o"))
        if (ROOT / "csrc" / path.relative_to(ROOT / "build")).with_suffix("").exists()
        and path.name != "no_cuda.c.o"
    ]
    path = folder / "libfaulty.so"
    wraps = [f"-Wl,--wrap={name}" for name in WRAPPED]
    link = ["c++", "-shared", "-pthread", "-Wl,--no-undefined", *wraps, "-o", path]
    subprocess.run([*link, *objects, *fakes, "-lm"], check=True)
    return Faulty(path)


@pytest.fixture(scope="module")
def config() -> ModelConfig:
    return ModelConfig.from_directory(resolve("toy"))


class Life:
    """An engine's whole life in steps; what was open is closed at the end, whatever happened."""

    def __init__(self, faulty: Faulty, config: ModelConfig) -> None:
        self.engine = Engine(faulty.library, config, ROOM)
        self.missing = dict(config.weight_shapes())

    def load(self) -> None:
        """Loads what is not loaded yet: called again, it goes on with the tensor that failed."""
        while self.missing:
            name, shape = next(iter(self.missing.items()))
            self.engine.load_weight(name, np.full(shape, 0x3C00, np.uint16))
            del self.missing[name]
        self.engine.finish_loading()

    def steps(self) -> None:
        """Prefill, a decode of one sequence and one of many, reading and filling the cache."""
        engine = self.engine
        engine.forward(build_batch([SequenceSlice(list(range(40)), 0, [0, 1, 2])], 16, "all"))
        one = build_batch([SequenceSlice([7], 40, [0, 1, 2])], 16)
        engine.decode(one, 2)
        many = [SequenceSlice([7], 3, [block]) for block in range(3)]
        engine.forward(build_batch(many, 16), logits=np.empty((3, 320), np.float32))
        nine = build_batch([SequenceSlice([7], i, [6]) for i in range(9)], 16)
        for _ in range(3):  # launched, recorded as a graph, replayed
            engine.forward(nine, next_ids=np.empty(9, np.int32))
        engine.forward_begin(nine, next_ids=np.empty(9, np.int32))
        engine.forward_end()
        engine.read_kv(0, np.arange(4, dtype=np.int32))
        engine.fill_blocks([5], 0x7FC1)
        engine.read_weight("model.norm.weight")

    def close(self) -> None:
        self.engine.close()


def live_through(faulty: Faulty, config: ModelConfig) -> Iterator[str]:
    """The stages of a life, each named before it begins; the engine is closed in any case."""
    yield "create"
    life = Life(faulty, config)
    try:
        yield "load"
        life.load()
        yield "steps"
        life.steps()
        yield "again"
        life.steps()
    finally:
        life.close()


def num_calls(faulty: Faulty, config: ModelConfig) -> int:
    faulty.arm(None)
    for _ in live_through(faulty, config):
        pass
    return faulty.calls


def fail_each(faulty: Faulty, config: ModelConfig, code: int, sticky: bool) -> dict[str, int]:
    """Lives through every k; what came of it, counted."""
    faulty.arm(None)
    total = num_calls(faulty, config)
    before = faulty.live
    outcomes: dict[str, int] = {}
    for k in range(1, total + 1):
        outcome = one_life(faulty, config, k, code, sticky)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        assert faulty.live == before, f"call {k} of {total}, {faulty.failed}: leaks"
    faulty.arm(None)
    assert num_calls(faulty, config) == total  # the next engine lives as the first did
    assert faulty.live == before
    return outcomes


def one_life(faulty: Faulty, config: ModelConfig, k: int, code: int, sticky: bool) -> str:
    """A life whose k-th call fails; the stage is retried once, as a caller would."""
    faulty.arm(k, code, sticky)
    try:
        life = Life(faulty, config)
    except EngineError as error:
        check(error, faulty)
        return "refused to begin"
    try:
        for stage in (life.load, life.steps):
            try:
                stage()
            except EngineError as error:
                check(error, faulty)
                return after_failure(life, stage, error, faulty, sticky)
    finally:
        life.close()
    return "nobody noticed" if faulty.failed else "never reached"


def after_failure(life: Life, stage, error: EngineError, faulty: Faulty, sticky: bool) -> str:
    """Dead engines say so; any other works from here on."""
    if isinstance(error, DeviceFailed):
        with pytest.raises(DeviceFailed, match="this engine is dead"):
            stage()
        return "dead"
    if sticky:
        return "failed"
    stage()
    if stage == life.load:
        life.steps()
    return "usable"


def check(error: EngineError, faulty: Faulty) -> None:
    """Typed, and naming the call or what was asked for."""
    assert isinstance(error, (OutOfMemory, DeviceFailed, DeviceUnavailable)), repr(error)
    assert "cuda" in str(error) or "bytes" in str(error) or "CUDA" in str(error), str(error)


def test_a_life_without_failures_leaves_nothing(faulty: Faulty, config: ModelConfig):
    faulty.arm(None)
    before = faulty.live

    assert num_calls(faulty, config) > 150
    assert faulty.live == before


@pytest.mark.parametrize("code", [OUT_OF_MEMORY, NO_DEVICE, LAUNCH_FAILED])
def test_every_call_may_fail_once(faulty: Faulty, config: ModelConfig, code: int):
    outcomes = fail_each(faulty, config, code, sticky=False)

    assert outcomes["refused to begin"] > 20
    assert outcomes["dead" if code == LAUNCH_FAILED else "usable"] > 50


def test_every_call_may_fail_for_good(faulty: Faulty, config: ModelConfig):
    outcomes = fail_each(faulty, config, LAUNCH_FAILED, sticky=True)

    assert outcomes["dead"] > 50


def test_only_what_cannot_be_told_goes_unnoticed(faulty: Faulty, config: ModelConfig):
    total, unnoticed = num_calls(faulty, config), set()
    for k in range(1, total + 1):
        if one_life(faulty, config, k, LAUNCH_FAILED, False) == "nobody noticed":
            unnoticed.add(faulty.failed)

    assert unnoticed <= {"cudaFree", "cudaStreamDestroy", "cudaGraphExecDestroy"}  # end a life


def test_memory_that_is_refused_is_told_with_what_was_asked_and_what_was_free(faulty, config):
    with pytest.raises(OutOfMemory, match=r"\d+ bytes of device memory asked, \d+ of \d+ free"):
        faulty.arm(5, OUT_OF_MEMORY)
        Engine(faulty.library, config, ROOM)


@pytest.mark.parametrize(
    ("version", "sticky", "message"),
    [
        (0, False, "no CUDA device: no NVIDIA driver was found"),
        (11040, False, "no CUDA device: made to fail"),  # there is one, too old
        (0, True, "no CUDA device: made to fail"),  # nor is its version told
    ],
)
def test_no_driver_is_not_called_an_old_one(faulty, config, version: int, sticky: bool, message):
    faulty.driver(version)
    faulty.arm(1, OLD_DRIVER, sticky)
    try:
        with pytest.raises(DeviceUnavailable, match=message):
            Engine(faulty.library, config, ROOM)
    finally:
        faulty.driver(13000)


@pytest.mark.parametrize("filling", [0, 0x5A])
def test_scores_leave_the_device_defined(faulty: Faulty, filling: int):
    # A score is copied out whole, and kernels compute nothing here: what comes out is what the
    # memory held before, so it must have been written whatever a row asks for.
    faulty.arm(None)
    faulty.fill(filling)
    rows = page.rows(3, num_logprobs=[0, 2, 20])
    try:
        with Ops(faulty.library, "cuda") as ops:
            scores = ops.sample(np.zeros((3, 40), np.float32), page.sampling(rows, None, 20))[1]
    finally:
        faulty.fill(0)

    assert scores is not None
    assert scores.token_ranks.tolist() == [0, 0, 0]
    assert scores.top_ids[2].tolist() == [0] * 20


def test_a_leak_would_be_noticed(faulty: Faulty, config: ModelConfig):
    faulty.arm(None)
    before = faulty.live
    life = Life(faulty, config)

    assert faulty.live[0] > before[0] and faulty.live[1] > before[1]
    life.close()
    assert faulty.live == before
