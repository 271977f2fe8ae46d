"""How the attention of a decode batch is dealt out to thread blocks, without a GPU."""

import ctypes
import subprocess
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

TILE, SEGMENT = 128, 8
KEYS = TILE * SEGMENT
LENGTHS = st.lists(
    st.integers(1, 300)
    | st.integers(1, 40_000)
    | st.sampled_from([127, 128, 129, 1023, 1024, 1025, 1535, 1536, 1537, 2560, 131_072]),
    min_size=1,
    max_size=40,
)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    """csrc/kernels/decode_batch_line.cuh alone, compiled for the host."""
    path = tmp_path_factory.mktemp("layout") / "decode_batch_line.so"
    source = Path(__file__).resolve().parent / "layout" / "decode_batch_line.cc"
    flags = ["-x", "c++", "-std=c++17", "-O1", "-shared", "-fPIC"]
    subprocess.run(["cc", *flags, source, "-o", path], check=True)
    return ctypes.CDLL(str(path))


def tiles(length: int) -> int:
    return -(-length // TILE)


class Deal:
    """Every block's run, as positions, and every row's first position and length."""

    def __init__(self, line, lengths: list[int], heads: int, blocks: int) -> None:
        self.rows = []
        position = 0
        for length in lengths:
            for _ in range(heads):
                self.rows.append((position, length))
                position += tiles(length)
        self.line = position
        starts = [line.first_position(position, block, blocks) for block in range(blocks + 1)]
        self.shares = [end - start for start, end in zip(starts, starts[1:], strict=False)]
        self.ends = [self._moved(line, start) for start in starts]

    def _moved(self, line, position: int) -> int:
        for start, length in self.rows:
            if start <= position < start + tiles(length):
                return start + line.cut_at(position - start, length)
        return position

    def parts(self, row: int) -> dict[int, range]:
        """The row's tiles, by block."""
        start, length = self.rows[row]
        found = {}
        for block, (begin, end) in enumerate(zip(self.ends, self.ends[1:], strict=False)):
            own = range(max(begin - start, 0), min(end - start, tiles(length)))
            if own:
                found[block] = own
        return found


@given(LENGTHS, st.integers(1, 8), st.integers(1, 200))
@example([1028] * 32, 8, 132)
@example([131_072] * 9, 8, 132)
@example([1], 1, 200)
def test_every_tile_is_one_blocks_and_rows_are_cut_at_segments(line, lengths, heads, blocks):
    deal = Deal(line, lengths, heads, blocks)

    assert deal.ends[0] == 0 and deal.ends[-1] == deal.line
    assert deal.ends == sorted(deal.ends)
    assert max(deal.shares) - min(deal.shares) <= 1
    for row, (_, length) in enumerate(deal.rows):
        parts = list(deal.parts(row).values())
        assert [t for part in parts for t in part] == list(range(tiles(length)))
        for part in parts[1:]:
            assert part.start % SEGMENT == 0
            assert length - part.start * TILE >= KEYS // 2  # never for the sake of a few keys


@given(LENGTHS, st.integers(1, 8), st.integers(1, 200))
@example([131_072] * 9, 8, 132)
@example([131_072] * 66 + [1] * 190, 8, 132)
def test_a_place_per_block_and_segment_holds_whatever_blocks_share(line, lengths, heads, blocks):
    # What the kernel keeps for rows that blocks share: the first part's fold at its last segment,
    # every segment of the others. The place is the first block's: no two rows may need the same.
    deal = Deal(line, lengths, heads, blocks)
    taken = set()

    for row, (start, length) in enumerate(deal.rows):
        parts = deal.parts(row)
        first = line.block_with(deal.line, start, blocks)
        assert first == min(parts)
        if len(parts) == 1:
            continue
        assert first not in taken
        taken.add(first)
        stored = set()
        for block, part in parts.items():
            segments = range(part.start // SEGMENT, -(-part.stop // SEGMENT))
            stored |= {segments[-1]} if block == first else set(segments)
        # what the last to finish folds, from the first part's end as it counts it
        cut = -(-(line.first_position(deal.line, first + 1, blocks) - start) // SEGMENT)
        assert stored == set(range(cut - 1, -(-length // KEYS)))


def test_a_cut_before_the_last_few_keys_would_be_noticed(line):
    deal = Deal(line, [1028] * 32, 8, 132)
    deal.ends[1] = 8  # of the first row, tile 8 holds four keys

    parts = deal.parts(0)

    assert len(parts) == 2 and 1028 - parts[1].start * TILE < KEYS // 2
