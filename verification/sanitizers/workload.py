"""What runs under the sanitizers: every kernel, at the shapes where its edges are, on toys.

Prints one line per case and nothing of the results, which tests/kernels hold to the twin. Kept
small: a sanitizer makes a kernel ten to a hundred times slower. KV blocks that no sequence owns are
filled with NaN, so reading one is no reading of unwritten memory; that it changes no bit is tested.
Knows the engine, not the tools. `python -m verification.sanitizers.workload [PART ...]`
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import ml_dtypes
import numpy as np

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Library, Tap, TapPoint
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.ops import Ops
from engine.sampling import EDIT, ROW, SamplingBatch
from engine.sources.toy import CONFIGS

NAN = 0x7FC1
TOKENS = (1, 8, 9, 17, 64, 65, 129)  # around the fragments of 8, the strips of 64, the tiles of 128
# Models whose steps run whole: heads per kv head 2 and 3; an odd vocabulary; long reductions.
MODELS = ("toy", "toy-gqa3", "toy-untied", "toy-wide")
OPERATIONS = "operations"
PARTS = (OPERATIONS, *MODELS)  # each may run in a process of its own
# Of a prompt, then decoded: around a tile of 128 keys and a segment of 1024.
MANY = (12, 33, 70)  # sequences: a part of a tile of 32, more than one, more than one of 64
LENGTHS = ((1,), (127, 128, 129), (1030, 1, 16))
ROOM = EngineConfig(
    device="cuda",
    num_threads=0,
    block_size=16,
    num_blocks=160,
    max_seq_len=1100,
    max_num_tokens=1100,
    max_num_seqs=80,
)

Case = tuple[str, Callable[[], object]]


def _bf16(*shape: int) -> np.ndarray:
    random = np.random.default_rng(sum(shape))
    values = random.standard_normal(shape, dtype=np.float32)
    return values.astype(ml_dtypes.bfloat16).view(np.uint16)


def operator_cases(ops: Ops) -> Iterator[Case]:
    """Every operation of engine.ops, alone."""
    table, ids = _bf16(331, 192), np.array([0, 330, 7, 7, 64], np.int32)
    yield "embedding, 5 of 331 rows of 192", lambda: ops.embedding(table, ids)
    for hidden in (64, 576, 2048, 2112):
        x = _bf16(9, hidden)
        yield f"rms_norm, 9 x {hidden}", lambda x=x: ops.rms_norm(x, x[0].copy(), 1e-5)
    for count in TOKENS:
        for rows, cols in ((64, 64), (331, 192), (192, 1088)):
            x, weight = _bf16(count, cols), _bf16(rows, cols)
            what = f"{count} tokens, weight {rows} x {cols}"
            yield f"linear, {what}", lambda x=x, w=weight: ops.linear(x, w)
            if rows == 331:
                yield f"linear_f32, {what}", lambda x=x, w=weight: ops.linear_f32(x, w)
    rope = ops.rope_table(CONFIGS["toy"], 130)
    for count in (1, 33):
        x, positions = _bf16(count, 3, 64), np.arange(count, dtype=np.int32) * 4 % 130
        yield (
            f"rotary_embedding, {count} x 3 heads",
            lambda x=x, p=positions: ops.rotary_embedding(x, rope, p),
        )
    yield from _attention_cases(ops)
    for count in (1, 9):
        x, y = _bf16(count, 320), _bf16(count, 320)
        yield f"silu_and_mul, {count} x 320", lambda x=x, y=y: ops.silu_and_mul(x, y)
        yield f"residual_add, {count} x 320", lambda x=x, y=y: ops.residual_add(x, y)
    logits = np.random.default_rng(1).standard_normal((3, 331), dtype=np.float32)
    yield "argmax, 3 x 331", lambda: ops.argmax(logits)
    yield from _sampling_cases(ops)
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


def _sampling_cases(ops: Ops) -> Iterator[Case]:
    counters = (np.arange(33, dtype=np.uint64), *[np.arange(33, dtype=np.int32)] * 2)
    yield "uniform, 33", lambda: ops.uniform(*counters)
    for vocab_size in (33, 2049):
        logits = np.random.default_rng(2).standard_normal((3, vocab_size), dtype=np.float32)
        rows = np.zeros(3, ROW)
        rows["temperature"], rows["repetition_penalty"] = (0, 1, 0.7), 1.3
        rows["top_p"], rows["top_k"], rows["min_p"] = (1, 0.9, 0.5), (0, 7, 31), (0, 0, 0.01)
        rows["num_logprobs"], rows["scored_id"], rows["num_edits"] = 5, -1, 2
        edits = np.zeros(6, EDIT)
        edits["token_id"], edits["count"], edits["flags"] = [0, 32] * 3, 3, [1, 3] * 3
        unscored = rows.copy()
        unscored["num_logprobs"] = -1
        batch, plain = SamplingBatch(rows, edits, 5), SamplingBatch(unscored, edits, None)
        yield f"sample, 3 x {vocab_size}", lambda x=logits, b=batch: ops.sample(x, b)
        yield f"edit_logits, 3 x {vocab_size}", lambda x=logits, b=plain: ops.edit_logits(x, b)


def _attention_cases(ops: Ops) -> Iterator[Case]:
    for block_size in (16, 128):
        for group in (1, 4):
            for runs in ([(126, 1), (127, 1), (128, 1), (1029, 1)], [(0, 130), (120, 9), (0, 1)]):
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


def model_cases(name: str, runner: ModelRunner) -> Iterator[Case]:
    """Whole steps: prefill, decode with taps, decode fused in one launch, and in chained ones."""
    for lengths in LENGTHS:
        tables = _tables(runner, lengths)
        parts = [
            SequenceSlice(_ids(runner, n), 0, table)
            for n, table in zip(lengths, tables, strict=True)
        ]
        prefill = build_batch(parts, ROOM.block_size, "last")
        step = _decode_batch(lengths, tables)
        yield f"{name}: prefill of {lengths}", lambda b=prefill: runner.forward(b)
        yield f"{name}: decode after {lengths}, a tap", lambda b=step: _tapped(runner, b)
        yield f"{name}: 2 greedy steps after {lengths}", lambda b=step: runner.engine.decode(b, 2)
    for count in MANY:
        step = _decode_batch((5,) * count, _tables(runner, (5,) * count))
        what = f"{name}: 2 greedy steps of {count} sequences"
        yield what, lambda b=step: runner.engine.decode(b, 2)
    slots = np.arange(40, dtype=np.int32)
    yield f"{name}: read_kv, 40 slots", lambda: runner.read_kv(0, slots)


def _ids(runner: ModelRunner, count: int) -> list[int]:
    return (np.arange(count) * 7 % runner.config.vocab_size).tolist()


def _tables(runner: ModelRunner, lengths: Sequence[int]) -> list[list[int]]:
    """Blocks in a shuffled order, room for two steps more; every block poisoned first."""
    runner.fill_blocks(range(ROOM.num_blocks), NAN)
    blocks = np.random.default_rng(3).permutation(ROOM.num_blocks).tolist()
    return [[blocks.pop() for _ in range(-(-(n + 3) // ROOM.block_size))] for n in lengths]


def _decode_batch(lengths: Sequence[int], tables: Sequence[Sequence[int]]):
    parts = [SequenceSlice([3], n, table) for n, table in zip(lengths, tables, strict=True)]
    batch = build_batch(parts, ROOM.block_size)
    padded = np.zeros((len(tables), max(map(len, tables))), np.int32)
    for row, table in zip(padded, tables, strict=True):
        row[: len(table)] = table
    return replace(batch, block_tables=padded)


def _tapped(runner: ModelRunner, batch) -> None:
    buffer = runner.tap_buffer(TapPoint.attn, batch)
    runner.forward(batch, [Tap(TapPoint.attn, 0, out=buffer)])


def run_cases(cases: Iterator[Case]) -> int:
    """Runs and names each; how many there were."""
    count = 0
    for what, call in cases:
        print(f"case {what}", flush=True)
        call()
        count += 1
    return count


def main(parts: Sequence[str] = PARTS) -> int:
    """Some parts of the workload; the last line says how many cases ran."""
    library, count = Library(), 0
    for part in parts:
        if part == OPERATIONS:
            with Ops(library, "cuda") as ops:
                count += run_cases(operator_cases(ops)) + run_cases(fused_cases(ops))
        else:
            with ModelRunner(resolve(part), ROOM, library) as runner:
                count += run_cases(model_cases(part, runner))
    print(f"{count} cases ran")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or PARTS))
