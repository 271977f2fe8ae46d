"""What runs under the sanitizers: every kernel, at the shapes where its edges are, on toys.

Prints one line per case, how long it took, and nothing of the results, which tests/kernels hold to
the twin. Kept small: a sanitizer makes a kernel ten to a hundred times slower. Cached keys are a
constant, written before anything reads them; KV blocks that no sequence owns are filled with NaN,
so reading one is no reading of unwritten memory; that it changes no bit is tested. Knows the
engine, not the tools. `python -m verification.sanitizers.workload [PART ...]`
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np

from engine.batch import Batch, SequenceSlice, build_batch
from engine.bindings import Library, Tap, TapPoint
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import cache_root, resolve
from engine.ops import Ops
from engine.sampling import EDIT, ROW, SamplingBatch
from engine.source_stamp import source_stamp
from engine.sources.shape import resolve_random
from engine.sources.toy import CONFIGS

NAN, ONE = 0x7FC1, 0x3F80
TOKENS = (1, 8, 9, 17, 64, 65, 129)  # around the fragments of 8, the strips of 64, the tiles of 128
# Models whose steps run whole: heads per kv head 2 and 3; an odd vocabulary; long reductions.
MODELS = ("toy", "toy-gqa3", "toy-untied", "toy-wide")
# Reductions of 3, 4, 6 and 8 chunks, which no toy has: more blocks share them in a step of many;
# and so many heads that a block of such a step has a tile of their rows alone.
LONG_SUMS = {
    "three-to-six-chunks": replace(
        CONFIGS["toy"],
        num_layers=1,
        hidden_size=1536,
        num_heads=32,
        num_kv_heads=8,
        intermediate_size=3072,
    ),
    "eight-chunks": replace(CONFIGS["toy"], num_layers=1, intermediate_size=3648),
    "many-heads": replace(
        CONFIGS["toy"], num_layers=1, hidden_size=64, num_heads=64, num_kv_heads=8
    ),
}
# Of sequences: cached keys around a tile of 128 and a segment of 1024.
FEW = ((127,), (1030, 0, 16), (129, 5, 0, 17, 127))  # of one row, of up to four, of up to eight
MANY = (12, 33, 70)  # sequences: a part of a tile of 32, more than one, more than one of 64
MANY_LENGTHS = (1030, 127, 128, 5)  # the last one again and again
PROMPTS = ((17,), (129, 1))  # of a step of single operations, and of fused ones
ROOM = EngineConfig(
    device="cuda",
    num_threads=0,
    block_size=16,
    num_blocks=160,
    max_seq_len=1100,
    max_num_tokens=160,
    max_num_seqs=80,
)

Case = tuple[str, Callable[[], object]]


def _bf16(*shape: int) -> np.ndarray:
    random = np.random.default_rng(sum(shape))
    values = random.standard_normal(shape, dtype=np.float32)
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def linear_cases(ops: Ops) -> Iterator[Case]:
    """Linear layers of few tokens and many."""
    for count in TOKENS:
        for rows, cols in ((64, 64), (331, 192), (192, 1088)):
            x, weight = _bf16(count, cols), _bf16(rows, cols)
            what = f"{count} tokens, weight {rows} x {cols}"
            yield f"linear, {what}", lambda x=x, w=weight: ops.linear(x, w)
            if rows == 331:
                yield f"linear_f32, {what}", lambda x=x, w=weight: ops.linear_f32(x, w)
    for count in (3, 16, 32):  # rounds of chunks: the next one writes what the last may still read
        x, weight = _bf16(count, 8192), _bf16(64, 8192)
        yield f"linear, {count} tokens, weight 64 x 8192", lambda x=x, w=weight: ops.linear(x, w)


def elementwise_cases(ops: Ops) -> Iterator[Case]:
    """What goes through memory once."""
    table, ids = _bf16(331, 192), np.array([0, 330, 7, 7, 64], np.int32)
    yield "embedding, 5 of 331 rows of 192", lambda: ops.embedding(table, ids)
    for hidden in (64, 100, 576, 2048, 2112):  # 100 is no multiple of a vector
        x = _bf16(9, hidden)
        yield f"rms_norm, 9 x {hidden}", lambda x=x: ops.rms_norm(x, x[0].copy(), 1e-5)
    rope = ops.rope_table(CONFIGS["toy"], 130)
    for count in (1, 33):
        x, positions = _bf16(count, 3, 64), np.arange(count, dtype=np.int32) * 4 % 130
        yield (
            f"rotary_embedding, {count} x 3 heads",
            lambda x=x, p=positions: ops.rotary_embedding(x, rope, p),
        )
    for count in (1, 9):
        x, y = _bf16(count, 320), _bf16(count, 320)
        yield f"silu_and_mul, {count} x 320", lambda x=x, y=y: ops.silu_and_mul(x, y)
        yield f"residual_add, {count} x 320", lambda x=x, y=y: ops.residual_add(x, y)
    c, a = np.zeros(33, np.float32), _bf16(33, 16)
    yield "tensor_core_step, 33", lambda: ops.tensor_core_step(c, a, a)
    yield "exp2, 257", lambda: ops.exp2(np.linspace(-130, 130, 257, dtype=np.float32))


def fused_cases(ops: Ops) -> Iterator[Case]:
    """The operations that only a GPU has, alone: around a tile, and shared by two thread blocks."""
    for count, rows, cols in ((33, 64, 64), (129, 200, 576), (128, 128, 1024)):
        x, gate, up, residual = (
            _bf16(*shape) for shape in ((count, cols), (rows, cols), (rows, cols), (count, rows))
        )
        what = f"{count} tokens, weight {rows} x {cols}"
        yield (
            f"linear_add, {what}",
            lambda x=x, w=gate, r=residual: ops.linear_add(x, w, r),
        )
        yield f"gated_linear, {what}", lambda x=x, g=gate, u=up: ops.gated_linear(x, g, u)


def sampling_cases(ops: Ops) -> Iterator[Case]:
    """From logits to a token and its scores."""
    logits = np.random.default_rng(1).standard_normal((3, 331), dtype=np.float32)
    yield "argmax, 3 x 331", lambda: ops.argmax(logits)
    counters = (np.arange(33, dtype=np.uint64), *[np.arange(33, dtype=np.int32)] * 2)
    yield "uniform, 33", lambda: ops.uniform(*counters)
    yield from _choices(ops, 2049, [GREEDY, DRAWN])


def _choices(ops: Ops, vocab_size: int, rows: list[dict[str, float]]) -> Iterator[Case]:
    logits = np.random.default_rng(2).standard_normal((len(rows), vocab_size), np.float32)
    what, chosen, plain = f"{rows} of {vocab_size}", sampling_of(rows), sampling_of(rows, False)
    yield f"sample, {what}", lambda: ops.sample(logits, chosen)
    yield f"edit_logits, {what}", lambda: ops.edit_logits(logits, plain)


# How a row is chosen. racecheck takes a quarter of a minute over each of the two filters.
GREEDY: dict[str, float] = {}
DRAWN = {"temperature": 1}
BY_COUNT = {"temperature": 0.7, "top_k": 7, "min_p": 0.01}
BY_MASS = {"temperature": 0.7, "top_p": 0.9}


def sampling_of(choices: Sequence[dict[str, float]], is_scored: bool = True) -> SamplingBatch:
    """Rows of these choices, each with two edits."""
    count = len(choices)
    rows, edits = np.zeros(count, ROW), np.zeros(2 * count, EDIT)
    rows["top_p"], rows["repetition_penalty"] = 1, 1.3
    rows["num_logprobs"], rows["scored_id"], rows["num_edits"] = 5 if is_scored else -1, -1, 2
    for row, choice in zip(rows, choices, strict=True):
        for name, value in choice.items():
            row[name] = value
    rows["first_edit"] = 2 * np.arange(count)
    edits["token_id"], edits["count"] = np.resize((0, 32), 2 * count), 3
    edits["flags"] = np.resize((1, 3), 2 * count)
    return SamplingBatch(rows, edits, 5 if is_scored else None)


def attention_cases(ops: Ops) -> Iterator[Case]:
    """Decode and prefill, blocks in any order."""
    for block_size in (16, 128):
        for group in (1, 4):
            for runs in (
                [(126, 1), (127, 1), (128, 1), (1029, 1)],
                [(0, 130), (120, 9), (0, 1)],
                [(2099, 1), (3, 1)],
                [(5, 5)] * 70,  # more blocks than the card has multiprocessors: of three warpgroups
            ):
                counts = [-(-(start + new) // block_size) for start, new in runs]
                num_blocks = sum(counts) + 1  # one belongs to nobody
                blocks = np.random.default_rng(0).permutation(num_blocks).tolist()
                slices = [
                    SequenceSlice([0] * new, start, [blocks.pop() for _ in range(count)])
                    for (start, new), count in zip(runs, counts, strict=True)
                ]
                batch = build_batch(slices, block_size, "none")
                q = _bf16(sum(new for _, new in runs), 2 * group, 64)
                k = _bf16(num_blocks * block_size, 2, 64)
                yield (
                    f"attention, (cached, new) {runs}, {group} heads a kv head, block {block_size}",
                    lambda q=q, k=k, b=batch, s=block_size, n=num_blocks: ops.attention(
                        q, k, k, b, s, n
                    ),
                )


OPERATIONS: dict[str, Callable[[Ops], Iterator[Case]]] = {
    "linear": linear_cases,
    "fused linear": fused_cases,
    "attention": attention_cases,
    "sampling": sampling_cases,
    "sampling by count": lambda ops: _choices(ops, 33, [BY_COUNT]),
    "sampling by mass": lambda ops: _choices(ops, 33, [BY_MASS]),
    "elementwise": elementwise_cases,
}
# Models of which steps of so many sequences run alone; toy-gqa8: eight heads a kv head.
STEPS = {"toy-gqa8": MANY[:1], **dict.fromkeys(LONG_SUMS, MANY[-1:]), "eight-chunks": MANY}
PARTS = (*OPERATIONS, *MODELS, *STEPS)  # each may run in a process of its own


def model_cases(name: str, runner: ModelRunner) -> Iterator[Case]:
    """Whole steps: prefill, decode with taps, decode fused in one launch, and in chained ones."""
    runner.fill_blocks(range(ROOM.num_blocks), NAN)
    for lengths in PROMPTS:
        tables = _tables(runner, lengths)
        parts = [
            SequenceSlice(_ids(runner, n), 0, table)
            for n, table in zip(lengths, tables, strict=True)
        ]
        prefill = build_batch(parts, ROOM.block_size, "last")
        yield f"{name}: prefill of {lengths}", lambda b=prefill: runner.forward(b)
    for lengths in FEW:
        step = _decode_batch(lengths, _tables(runner, lengths))
        yield f"{name}: decode after {lengths}, a tap", lambda b=step: _tapped(runner, b)
        yield f"{name}: 2 greedy steps after {lengths}", lambda b=step: runner.engine.decode(b, 2)
    yield from many_cases(name, runner, MANY)
    lengths = (*MANY_LENGTHS, *[5] * 6)
    tables = _tables(runner, (*lengths, 17))
    parts = [SequenceSlice([3], n, table) for n, table in zip(lengths, tables, strict=False)]
    mixed = build_batch(
        [*parts, SequenceSlice(_ids(runner, 17), 0, tables[-1])], ROOM.block_size, "last"
    )
    yield (
        f"{name}: {len(lengths)} sequences decode beside a prompt of 17",
        lambda b=mixed: runner.forward(b),
    )
    step = _decode_batch((5, 3), _tables(runner, (5, 3)))
    yield (
        f"{name}: 2 tokens chosen with edits and scores",
        lambda b=step: runner.forward(b, sampling=sampling_of([GREEDY, DRAWN])),
    )
    slots = np.arange(40, dtype=np.int32)
    yield f"{name}: read_kv, 40 slots", lambda: runner.read_kv(0, slots)
    weight = "model.layers.0.mlp.down_proj.weight"
    yield f"{name}: read {weight}", lambda: runner.engine.read_weight(weight)


def many_cases(name: str, runner: ModelRunner, counts: Sequence[int]) -> Iterator[Case]:
    """Decode steps of so many sequences."""
    for count in counts:
        lengths = (*MANY_LENGTHS, *(MANY_LENGTHS[-1:] * (count - len(MANY_LENGTHS))))
        step = _decode_batch(lengths, _tables(runner, lengths))
        what = f"{name}: 2 greedy steps of {count} sequences"
        yield what, lambda b=step: runner.engine.decode(b, 2)


def long_sums_directory(name: str) -> Path:
    """The directory of a model of LONG_SUMS, generated if the cache does not have it."""
    return resolve_random(name, LONG_SUMS[name], cache_root(), lambda what, done, total: None)


def _ids(runner: ModelRunner, count: int) -> list[int]:
    return (np.arange(count) * 7 % runner.config.vocab_size).tolist()


def _tables(runner: ModelRunner, lengths: Sequence[int]) -> list[list[int]]:
    """Blocks in a shuffled order, full of a constant, with room for a few tokens more."""
    blocks = np.random.default_rng(3).permutation(ROOM.num_blocks).tolist()
    tables = [[blocks.pop() for _ in range(-(-(n + 3) // ROOM.block_size))] for n in lengths]
    runner.fill_blocks([block for table in tables for block in table], ONE)
    return tables


def _decode_batch(lengths: Sequence[int], tables: Sequence[Sequence[int]]) -> Batch:
    parts = [SequenceSlice([3], n, table) for n, table in zip(lengths, tables, strict=True)]
    batch = build_batch(parts, ROOM.block_size)
    padded = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return replace(batch, block_tables=padded)


def _tapped(runner: ModelRunner, batch: Batch) -> None:
    buffer = runner.tap_buffer(TapPoint.attn, batch)
    runner.forward(batch, [Tap(TapPoint.attn, 0, out=buffer)])


def run_cases(cases: Iterator[Case]) -> int:
    """Runs and names each; how many there were."""
    count = 0
    for what, call in cases:
        print(f"case {what}", flush=True)
        began = time.monotonic()
        call()
        print(f"  {time.monotonic() - began:.2f} s", flush=True)
        count += 1
    return count


def main(words: Sequence[str] = ()) -> int:
    """Some parts of the workload, by default all; the last line says how many cases ran."""
    parser = argparse.ArgumentParser(prog="python -m verification.sanitizers.workload")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--library", type=Path, help="of another checkout, built there")
    options = parser.parse_args(words)
    path, count = options.library, 0
    library = Library(path, path and source_stamp(path.parents[1] / "csrc"))
    for part in options.parts or PARTS:
        if part in OPERATIONS:
            with Ops(library, "cuda") as ops:
                count += run_cases(OPERATIONS[part](ops))
        elif part in STEPS:
            directory = long_sums_directory(part) if part in LONG_SUMS else resolve(part)
            with ModelRunner(directory, ROOM, library) as runner:
                count += run_cases(many_cases(part, runner, STEPS[part]))
        else:
            with ModelRunner(resolve(part), ROOM, library) as runner:
                count += run_cases(model_cases(part, runner))
    print(f"{count} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
