"""Every allocation of an engine and of an operation refused in turn: a clean error, and no leak.

The library is built once more, the CPU twin alone, with its allocator wrapped by the linker.
"""

from pathlib import Path

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Engine, Library
from engine.config import EngineConfig, ModelConfig
from engine.errors import OutOfMemory
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops
from tests.runtime.wrapped_twin import build_wrapped_twin
from tests.twin.bits import assert_same_bits, normal
from tests.twin.paged import attend, draw

WRAPPED = ("malloc", "calloc", "aligned_alloc", "posix_memalign", "free", "pthread_create")
# Two threads: starting the pool is among what can fail.
ROOM = EngineConfig(
    "cpu",
    num_blocks=2,
    max_seq_len=32,
    max_num_tokens=16,
    max_num_seqs=1,
    block_size=16,
    num_threads=2,
)
TEXT = [1, 2, 3, 4, 5]


class Faulty:
    """The library with a wrapped allocator."""

    def __init__(self, path: Path) -> None:
        self.library = Library(path)
        self._ffi = type(self.library.ffi)()
        self._ffi.cdef(
            "void faults_fail_allocation(long n);long faults_requests(void);long faults_live(void);"
        )
        self._lib = self._ffi.dlopen(str(path))

    def fail_allocation(self, n: int | None) -> None:
        """Refuse the n-th request from now on, counted from 1, or none; counts anew."""
        self._lib.faults_fail_allocation(n or 0)

    @property
    def requests(self) -> int:
        return self._lib.faults_requests()

    @property
    def live(self) -> int:
        return self._lib.faults_live()


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Faulty:
    path = tmp_path_factory.mktemp("faults") / "libfaulty.so"
    build_wrapped_twin(path, "fail_nth_allocation.c", WRAPPED)
    return Faulty(path)


def config() -> ModelConfig:
    return ModelConfig.from_directory(resolve("toy"))


def logits(library: Library) -> np.ndarray:
    with ModelRunner(resolve("toy"), ROOM, library) as runner:
        return runner.forward(build_batch([SequenceSlice(TEXT, 0, [1])], 16, "all")).logits


def test_the_wrapped_library_computes_the_same_bits(faulty: Faulty, library: Library):
    # at -O1 instead of -O3, so this also shows that the compiler does not enter the bits
    faulty.fail_allocation(None)

    assert_same_bits(logits(faulty.library), logits(library))


def test_every_allocation_of_an_engine_may_fail(faulty: Faulty):
    faulty.fail_allocation(None)
    before = faulty.live
    with Engine(faulty.library, config(), ROOM):
        num_requests = faulty.requests
        assert faulty.live > before
    assert faulty.live == before
    assert num_requests > 30  # 20 tensors, the activations, the cache, the pool of threads

    for n in range(1, num_requests + 1):
        faulty.fail_allocation(n)
        with pytest.raises(OutOfMemory) as error:
            Engine(faulty.library, config(), ROOM)
        assert "bytes" in str(error.value) or "thread" in str(error.value)
        assert faulty.live == before, f"allocation {n} of {num_requests} leaks when refused"

    faulty.fail_allocation(num_requests + 1)  # one more than there are: succeeds
    Engine(faulty.library, config(), ROOM).close()


def test_after_every_failure_the_next_engine_computes_the_same_bits(
    faulty: Faulty, library: Library
):
    expected = logits(library)
    for n in (1, 2, 5, 10, 20, 30):
        faulty.fail_allocation(n)
        with pytest.raises(OutOfMemory):
            Engine(faulty.library, config(), ROOM)

        faulty.fail_allocation(None)
        assert_same_bits(logits(faulty.library), expected)


def test_loading_and_steps_ask_for_no_memory(faulty: Faulty):
    # engine.h: the engine allocates everything when it is created
    faulty.fail_allocation(None)
    with Engine(faulty.library, config(), ROOM) as engine:
        faulty.fail_allocation(1)
        for name, shape in engine.config.weight_shapes().items():
            engine.load_weight(name, np.zeros(shape, np.uint16))
        engine.finish_loading()
        engine.forward(build_batch([SequenceSlice(TEXT, 0, [1])], 16, "all"))
        engine.read_kv(0, np.arange(5, dtype=np.int32))
        engine.fill_blocks([0], 0)
        engine.read_weight("model.norm.weight")

        assert faulty.requests == 0
        faulty.fail_allocation(None)


def test_greedy_steps_in_a_row_ask_for_no_memory(faulty: Faulty):
    faulty.fail_allocation(None)
    with ModelRunner(resolve("toy"), ROOM, faulty.library) as runner:
        batch = build_batch([SequenceSlice([1], 0, [1])], 16)
        faulty.fail_allocation(None)

        runner.engine.decode(batch, 3)

        assert faulty.requests == 0


OPERATIONS = {
    "embedding": lambda ops: ops.embedding(normal(1, 9, 64), np.arange(3, dtype=np.int32)),
    "rms_norm": lambda ops: ops.rms_norm(normal(1, 2, 64), normal(2, 64), 1e-5),
    "linear": lambda ops: ops.linear(normal(1, 2, 64), normal(2, 9, 64)),
    "linear_f32": lambda ops: ops.linear_f32(normal(1, 2, 64), normal(2, 9, 64)),
    "rope_table": lambda ops: ops.rope_table(config(), 9),
    "rotary_embedding": lambda ops: ops.rotary_embedding(
        normal(1, 2, 1, 64), normal(2, 9, 64), np.zeros(2, np.int32)
    ),
    "attention": lambda ops: attend(ops, [draw(1, 40, 3)])[0],
    "silu_and_mul": lambda ops: ops.silu_and_mul(normal(1, 2, 64), normal(2, 2, 64)),
    "residual_add": lambda ops: ops.residual_add(normal(1, 64), normal(2, 64)),
    "argmax": lambda ops: ops.argmax(np.zeros((2, 9), np.float32)),
    "tensor_core_step": lambda ops: ops.tensor_core_step(
        np.zeros(2, np.float32), normal(1, 2, 16), normal(2, 2, 16)
    ),
    "exp2": lambda ops: ops.exp2(np.zeros(4, np.float32)),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_allocation_of_an_operation_may_fail(faulty: Faulty, twin: Ops, name: str):
    operation = OPERATIONS[name]
    faulty.fail_allocation(None)
    with Ops(faulty.library, "cpu", 1) as ops:  # a worker would free its start at its leisure
        before = faulty.live
        faulty.fail_allocation(None)
        expected = operation(ops)
        num_requests = faulty.requests
        for n in range(1, num_requests + 1):
            faulty.fail_allocation(n)
            with pytest.raises(OutOfMemory, match="bytes"):
                operation(ops)
            assert faulty.live == before, f"allocation {n} of {num_requests} leaks when refused"
        faulty.fail_allocation(None)

        assert_same_bits(operation(ops), expected)
    assert_same_bits(operation(twin), expected)


def test_every_allocation_of_the_operations_surroundings_may_fail(faulty: Faulty):
    faulty.fail_allocation(None)
    before = faulty.live
    Ops(faulty.library, "cpu", 3).close()
    num_requests = faulty.requests
    assert faulty.live == before and num_requests >= 6

    for n in range(1, num_requests + 1):
        faulty.fail_allocation(n)
        with pytest.raises(OutOfMemory):
            Ops(faulty.library, "cpu", 3)
        assert faulty.live == before, f"allocation {n} of {num_requests} leaks when refused"
    faulty.fail_allocation(None)
