"""Every operation at every number of tokens: the GPU's bits are the twin's.

One table names all operations of engine.ops, so that a new one without a line here fails on any
machine. What else an operation may depend on is tested in the file of its name.
"""

from collections.abc import Callable

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.ops import Ops
from tests.kernels.inputs import NUM_TOKENS, assert_same_bits, normal, wide
from tests.kernels.operations import operator_names
from tests.twin import sampling_contract as page

VOCAB_SIZE = 331  # no tile divides it
HIDDEN = 576
FEW = (1, 9)  # tokens, where the table itself is tested

Call = Callable[[Ops], np.ndarray]
Case = Callable[[int], Call]


def floats(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def embedding(n: int) -> Call:
    table = normal(1, VOCAB_SIZE, HIDDEN)
    ids = np.random.default_rng(n).integers(0, VOCAB_SIZE, n).astype(np.int32)
    return lambda ops: ops.embedding(table, ids)


def rms_norm(n: int) -> Call:
    x, weight = wide(n, n, 2048, spread=4), normal(2, 2048)
    return lambda ops: ops.rms_norm(x, weight, 1e-6)


def linear(n: int) -> Call:
    x, weight = wide(n, n, HIDDEN), normal(3, 200, HIDDEN, scale=0.05)
    return lambda ops: ops.linear(x, weight)


def linear_f32(n: int) -> Call:
    x, weight = normal(n, n, 1088), normal(4, VOCAB_SIZE, 1088, scale=0.05)
    return lambda ops: ops.linear_f32(x, weight)


def fused_inputs(n: int) -> list[np.ndarray]:
    """Of a fused linear layer: x, two weights, a residual."""
    shapes = ((n, HIDDEN), (200, HIDDEN), (200, HIDDEN), (n, 200))
    return [normal(n + i, *shape, scale=0.3) for i, shape in enumerate(shapes)]


def linear_add(n: int) -> Call:
    x, weight, _, residual = fused_inputs(n)
    return lambda ops: ops.linear_add(x, weight, residual)


def linear_then_add(n: int) -> Call:
    x, weight, _, residual = fused_inputs(n)
    return lambda ops: ops.residual_add(ops.linear(x, weight), residual)


def gated_linear(n: int) -> Call:
    x, gate, up, _ = fused_inputs(n)
    return lambda ops: ops.gated_linear(x, gate, up)


def linear_twice_then_gate(n: int) -> Call:
    x, gate, up, _ = fused_inputs(n)
    return lambda ops: ops.silu_and_mul(ops.linear(x, gate), ops.linear(x, up))


def rotary_embedding(n: int) -> Call:
    angles = np.outer(np.arange(4096), 10000.0 ** (-np.arange(32) / 32))
    table = (np.concatenate([np.cos(angles), np.sin(angles)], 1).astype(np.float32)).view(np.uint32)
    table, x = (table >> 16).astype(np.uint16), wide(n, n, 3, 64, spread=2)
    positions = np.random.default_rng(n).permutation(4096)[:n].astype(np.int32)
    return lambda ops: ops.rotary_embedding(x, table, positions)


def attention(n: int) -> Call:
    """One prompt of n tokens, its blocks in any order."""
    block_size, num_blocks = 64, -(-n // 64) + 1
    blocks = np.random.default_rng(n).permutation(num_blocks)[: num_blocks - 1].tolist()
    batch = build_batch([SequenceSlice([0] * n, 0, blocks)], block_size, "none")
    k, v = (normal(n + i, num_blocks * block_size, 1, 64) for i in (1, 2))
    q = normal(n, n, 3, 64, scale=2.0)
    return lambda ops: ops.attention(q, k, v, batch, block_size, num_blocks)


def attention_of_many(n: int) -> Call:
    """So many sequences of one new token each, the longest of 40."""
    lengths = np.random.default_rng(n).integers(1, 41, n)
    blocks = np.random.default_rng(n).permutation(3 * n).reshape(n, 3).tolist()
    slices = [SequenceSlice([0], int(m) - 1, t) for m, t in zip(lengths, blocks, strict=True)]
    batch = build_batch(slices, 16, "none")
    k, v = (normal(n + i, 3 * n * 16, 1, 64) for i in (1, 2))
    q = normal(n, n, 4, 64, scale=2.0)
    return lambda ops: ops.attention(q, k, v, batch, 16, 3 * n)


def silu_and_mul(n: int) -> Call:
    gate, up = normal(n, n, 320, scale=3.0), normal(n + 1, n, 320)
    return lambda ops: ops.silu_and_mul(gate, up)


def residual_add(n: int) -> Call:
    x, y = normal(n, n, 320), normal(n + 1, n, 320)
    return lambda ops: ops.residual_add(x, y)


def argmax(n: int) -> Call:
    logits = np.round(floats(n, n, VOCAB_SIZE))  # ties
    return lambda ops: ops.argmax(logits)


def sampled_rows(n: int, **fields: object) -> np.ndarray:
    return page.rows(n, seed=np.arange(n), position=np.arange(n) * 7, top_p=0.9, **fields)


def sample(n: int) -> Call:
    logits = 3 * floats(n, n, VOCAB_SIZE)
    batch = page.sampling(sampled_rows(n, top_k=50, num_logprobs=5), max_logprobs=5)

    def call(ops: Ops) -> np.ndarray:
        ids, scores = ops.sample(logits, batch)
        fields = [ids, *vars(scores).values()]
        return np.concatenate([field.view(np.uint32).reshape(n, -1) for field in fields], axis=1)

    return call


def edit_logits(n: int) -> Call:
    logits = floats(n, n, VOCAB_SIZE)
    edits = np.zeros(2 * n, page.EDIT)
    edits["token_id"], edits["count"] = np.tile([0, VOCAB_SIZE - 1], n), 3
    edits["flags"], edits["bias"] = np.tile([1, 3], n), floats(n, 2 * n)
    rows = sampled_rows(n, repetition_penalty=1.3, frequency_penalty=0.5, num_edits=2)
    batch = page.sampling(rows, edits)
    return lambda ops: ops.edit_logits(logits, batch)


def uniform(n: int) -> Call:
    counters = np.arange(n, dtype=np.uint64) << 31, *[np.arange(n, dtype=np.int32)] * 2
    return lambda ops: ops.uniform(*counters)


def tensor_core_step(n: int) -> Call:
    c, a, b = floats(n, n), wide(n, n, 16), wide(n + 1, n, 16)
    return lambda ops: ops.tensor_core_step(c, a, b)


def exp2(n: int) -> Call:
    x = 40 * floats(n, n)
    return lambda ops: ops.exp2(x)


CASES: tuple[Case, ...] = (
    embedding,
    rms_norm,
    linear,
    linear_f32,
    linear_add,
    gated_linear,
    rotary_embedding,
    attention,
    attention_of_many,
    silu_and_mul,
    residual_add,
    argmax,
    sample,
    edit_logits,
    uniform,
    tensor_core_step,
    exp2,
)


# What the twin computes in place of an operation that it does not have.
ONE_BY_ONE = {linear_add: linear_then_add, gated_linear: linear_twice_then_gate}


def test_every_operation_has_a_case():
    assert {case.__name__.removesuffix("_of_many") for case in CASES} == operator_names()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_twin_gives_a_row_per_token_of_every_case(twin: Ops, case: Case):
    results = [ONE_BY_ONE.get(case, case)(n)(twin) for n in FEW]

    assert [len(result) for result in results] == list(FEW)
    assert len(np.unique(results[1])) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", NUM_TOKENS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_number_of_tokens_gives_the_twins_bits(
    gpu: Ops, twin: Ops, case: Case, num_tokens: int
):
    expected = ONE_BY_ONE.get(case, case)(num_tokens)(twin)

    assert_same_bits(case(num_tokens)(gpu), expected)
