"""Attention: the GPU's bits are the twin's, around every edge of tile, segment, block and chunk.

Every slot that no sequence owns holds poison, and block tables are permuted.
"""

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits, normal, wide

pytestmark = pytest.mark.gpu

HEAD_DIM = 64
# Around every block, tile and segment, and two of each.
SIZES = (16, 32, 64, 128, 256, 1024, 2048)
EDGES = (1, 2, *(size + by for size in SIZES for by in (-1, 0, 1)), 2100)
GROUP_SIZES = (1, 3, 4, 8)
POISON = {"nan": 0x7FC0, "inf": 0x7F80, "1e30": 0x7149}


class Scene:
    """Some sequences in a paged cache: (start, new tokens) each, blocks in random order."""

    def __init__(
        self,
        runs: list[tuple[int, int]],
        group_size: int,
        block_size: int,
        *,
        seed: int = 0,
        poison: int = POISON["nan"],
        num_kv_heads: int = 2,
        spread: int = 1,
    ):
        rng = np.random.default_rng(seed)
        needs = [-(-(start + new) // block_size) for start, new in runs]
        self.block_size = block_size
        self.num_blocks = sum(needs) + 3  # some belong to nobody
        ids = rng.permutation(self.num_blocks).tolist()
        shape = (self.num_blocks * block_size, num_kv_heads, HEAD_DIM)
        self.k = np.full(shape, poison, np.uint16)
        self.v = np.full(shape, poison, np.uint16)
        slices = []
        for i, (start, new) in enumerate(runs):
            table, ids = ids[: needs[i]], ids[needs[i] :]
            slots = np.array(
                [table[p // block_size] * block_size + p % block_size for p in range(start + new)]
            )
            self.k[slots] = wide(seed + 10 * i + 1, len(slots), *shape[1:], spread=spread)
            self.v[slots] = normal(seed + 10 * i + 2, len(slots), *shape[1:])
            slices.append(SequenceSlice([0] * new, start, table))
        self.batch = build_batch(slices, block_size, logits="none")
        num_tokens = sum(new for _, new in runs)
        self.q = normal(seed + 7, num_tokens, num_kv_heads * group_size, HEAD_DIM, scale=2.0)

    def run(self, ops: Ops) -> np.ndarray:
        return ops.attention(self.q, self.k, self.v, self.batch, self.block_size, self.num_blocks)


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_one_new_token_at_every_edge_gives_the_twins_bits(
    gpu: Ops, twin: Ops, group_size: int, block_size: int
):
    scene = Scene([(length - 1, 1) for length in EDGES], group_size, block_size)

    assert_same_bits(scene.run(gpu), scene.run(twin))


@pytest.mark.parametrize("length", EDGES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_whole_prompt_of_every_edge_length_gives_the_twins_bits(
    gpu: Ops, twin: Ops, group_size: int, length: int
):
    scene = Scene([(0, length)], group_size, 64, seed=length, num_kv_heads=1)

    assert_same_bits(scene.run(gpu), scene.run(twin))


@pytest.mark.parametrize(
    "run",
    [(0, 17), (100, 29), (127, 2), (128, 128), (1000, 300), (1020, 10), (1023, 2), (2047, 65)],
    ids=str,
)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_a_chunk_in_the_middle_of_a_prompt_gives_the_twins_bits(
    gpu: Ops, twin: Ops, group_size: int, run: tuple[int, int]
):
    scene = Scene([run], group_size, 16, seed=run[0])

    assert_same_bits(scene.run(gpu), scene.run(twin))


@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_prefill_and_decode_in_one_step_give_the_twins_bits(gpu: Ops, twin: Ops, group_size: int):
    runs = [(200, 1), (0, 70), (1500, 1), (90, 3), (0, 1), (1100, 40)]
    scene = Scene(runs, group_size, 32)

    assert_same_bits(scene.run(gpu), scene.run(twin))


@pytest.mark.parametrize("num_new", [2, 17, 130])
@pytest.mark.parametrize("place", [0, 7, 15])
def test_one_prompt_beside_decoding_rows_gives_the_twins_bits(
    gpu: Ops, twin: Ops, place: int, num_new: int
):
    # Twelve heads a group: two new tokens are more than the decode kernel takes.
    runs = [(40 * i, 1) for i in range(15)]
    runs.insert(place, (200, num_new))
    scene = Scene(runs, 12, 32, seed=place, num_kv_heads=1)

    assert_same_bits(scene.run(gpu), scene.run(twin))


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_many_decoding_rows_between_prompts_give_the_twins_bits(
    gpu: Ops, twin: Ops, group_size: int, block_size: int
):
    runs = [(length - 1, 1) for length in EDGES]
    for place, run in ((0, (3, 2)), (7, (0, 70)), (len(EDGES), (1000, 40))):
        runs.insert(place, run)
    scene = Scene(runs, group_size, block_size)

    assert_same_bits(scene.run(gpu), scene.run(twin))


def test_most_decoding_rows_of_a_step_give_the_twins_bits(gpu: Ops, twin: Ops):
    lengths = np.random.default_rng(5).integers(0, 400, 255).tolist()
    for more in ([], [(30, 1)]):  # one sequence more than the decode batch's kernel takes
        scene = Scene([(0, 50), *((length, 1) for length in lengths), *more], 4, 16)

        assert_same_bits(scene.run(gpu), scene.run(twin))


def test_many_decoding_rows_of_which_one_is_beyond_the_decode_kernel_give_the_twins_bits(
    gpu: Ops, twin: Ops
):
    scene = Scene([*((10 * i, 1) for i in range(9)), (199_999, 1)], 4, 128, num_kv_heads=1)

    assert_same_bits(scene.run(gpu), scene.run(twin))


def test_prefill_and_decode_in_a_step_that_decode_cannot_take_give_the_twins_bits(
    gpu: Ops, twin: Ops
):
    # A sequence beyond the decode kernel's shared memory: prefill's takes the decoding rows too.
    scene = Scene([(5, 1), (199_999, 1), (0, 70), (300, 1)], 4, 128, num_kv_heads=1)

    assert_same_bits(scene.run(gpu), scene.run(twin))


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON.keys())
@pytest.mark.parametrize("runs", [[(128, 1), (1030, 1), (4, 1)], [(0, 130), (1020, 50)]], ids=str)
def test_memory_that_no_sequence_owns_does_not_matter(
    gpu: Ops, runs: list[tuple[int, int]], poison: int
):
    clean = Scene(runs, 4, 128, poison=0).run(gpu)

    assert_same_bits(Scene(runs, 4, 128, poison=poison).run(gpu), clean)


@pytest.mark.parametrize("length", [1024 * 4 + 1, 1024 * 8, 1024 * 9 - 1, 20_000])
def test_a_long_context_gives_the_twins_bits(gpu: Ops, twin: Ops, length: int):
    scene = Scene([(length - 1, 1), (length // 3, 1)], 4, 128, num_kv_heads=1)

    assert_same_bits(scene.run(gpu), scene.run(twin))


def test_a_context_beyond_the_decode_kernels_shared_memory_gives_the_twins_bits(
    gpu: Ops, twin: Ops
):
    scene = Scene([(199_999, 1)], 4, 128, num_kv_heads=1)

    assert_same_bits(scene.run(gpu), scene.run(twin))


def test_a_group_of_heads_wider_than_one_instruction_gives_the_twins_bits(gpu: Ops, twin: Ops):
    scene = Scene([(300, 1), (0, 40)], 32, 64, num_kv_heads=1)

    assert_same_bits(scene.run(gpu), scene.run(twin))


def test_keys_of_very_different_size_give_the_twins_bits(gpu: Ops, twin: Ops):
    scene = Scene([(700, 1), (300, 200)], 4, 64, spread=6)

    assert_same_bits(scene.run(gpu), scene.run(twin))


@pytest.mark.parametrize("share", [1.0, 0.99, 0.5])
def test_rows_without_a_positive_score_give_the_twins_bits(gpu: Ops, twin: Ops, share: float):
    scene = Scene([(0, 300), (1000, 150), (700, 1)], 4, 64)
    scene.q &= np.uint16(0x7FFF)
    scene.k |= np.uint16(0x8000)
    some = np.random.default_rng(3).random(len(scene.q)) >= share  # whose scores are all positive
    scene.q[some] |= np.uint16(0x8000)

    assert_same_bits(scene.run(gpu), scene.run(twin))


def test_rows_of_zero_scores_of_either_sign_give_the_twins_bits(gpu: Ops, twin: Ops):
    scene = Scene([(0, 200)], 4, 64)
    scene.q &= np.uint16(0x8000)

    assert_same_bits(scene.run(gpu), scene.run(twin))


def test_a_sequence_gets_the_same_bits_alone_as_beside_others(gpu: Ops):
    runs = [(777, 1), (0, 100), (3000, 1)]
    together = Scene(runs, 4, 16, seed=3)

    alone = Scene(runs[:1], 4, 16, seed=3)
    alone.q = together.q[:1]

    assert_same_bits(alone.run(gpu), together.run(gpu)[:1])


def test_a_sequence_of_nan_leaves_the_others_bits_alone(gpu: Ops, twin: Ops):
    scene = Scene([(200, 1), (200, 1), (0, 90)], 4, 64)
    clean = scene.run(twin)
    scene.q[1] = 0x7FC0

    result = scene.run(gpu)

    assert (result[1] == 0x7FFF).all()
    assert_same_bits(np.delete(result, 1, 0), np.delete(clean, 1, 0))


@pytest.mark.parametrize("run", [(300, 1), (0, 300)], ids=str)
def test_infinite_and_nan_keys_and_values_give_the_twins_bits(
    gpu: Ops, twin: Ops, run: tuple[int, int]
):
    scene = Scene([run], 4, 64, seed=9)
    rng = np.random.default_rng(9)
    for cached in (scene.k, scene.v):
        special = rng.random(cached.shape) < 0.0005
        cached[special] = rng.choice([0x7F80, 0xFF80, 0x7FC0], int(special.sum()))

    assert_same_bits(scene.run(gpu), scene.run(twin))
