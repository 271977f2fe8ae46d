"""The comparison with the page is itself tested: each one-line fault of the sampling code is found.

verification/mutants judges by the model's operators; sampling is none of them, so its faults are
planted and judged here, in the twin, which the GPU is held to bit by bit.
"""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from engine.bindings import Library
from engine.ops import Ops
from engine.sampling import EDIT
from engine.source_stamp import source_stamp
from tests.twin import sampling_contract as page

CSRC = Path(__file__).resolve().parents[2] / "csrc"
FLAGS = [
    "-std=gnu11",
    "-O1",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-pthread",
    "-Wno-psabi",
    "-DBUILT_WITH_CUDA=0",
    f'-DSOURCE_STAMP="{source_stamp(CSRC)}"',
]

SAMPLE, EDITS, SCORE = "twin/sample.c", "twin/edit_logits.c", "twin/score_tokens.c"
UNIFORM, WEIGHT, CHOOSE = "model/uniform.c", "twin/weight.h", "model/sample.c"
# What is wrong, where, the text that occurs once, and what stands there instead.
FAULTS = [
    ("the weight is rounded up", WEIGHT, "return (uint64_t)(", "return 1 + (uint64_t)("),
    (
        "the largest logit is not subtracted",
        WEIGHT,
        "return contract_exp2((logit - largest) * scale)",
        "return contract_exp2(logit * scale)",
    ),
    ("temperature without log2(e)", CHOOSE, "1.4426950408889634 /", "1.0 /"),
    ("temperature multiplies", CHOOSE, "/ (double)row->temperature", "* (double)row->temperature"),
    ("the zeros are two values", SAMPLE, "x = x + 0.0f;", ""),
    ("negative logits in reverse", SAMPLE, "? ~bits :", "? bits :"),
    ("top_k one too many", SAMPLE, "count_of, row->top_k)", "count_of, row->top_k + 1)"),
    ("top_k one too few", SAMPLE, "if (sum >= target)", "if (sum > target)"),
    ("top_k of the whole vocabulary still cuts", SAMPLE, "row->top_k > 0 &&", "row->top_k > 1 &&"),
    (
        "top_p of all, not of what top_k left",
        SAMPLE,
        "order >= c->least && order < end",
        "order < end",
    ),
    ("what is above a range is forgotten", SAMPLE, "= above + sum_between", "= sum_between"),
    ("top_p rounded down", SAMPLE, " + (total * row->top_p != 0)", ""),
    ("top_p rounded up when exact", SAMPLE, "(total * row->top_p != 0)", "1"),
    ("min_p drops what equals it", SAMPLE, "p >= min_p", "p > min_p"),
    ("min_p ignored", SAMPLE, " && p >= min_p", ""),
    ("the filters do not reach the draw", SAMPLE, "order_of(logit) >= c->least && p", "p"),
    (
        "the point itself belongs to the token before",
        SAMPLE,
        "<= point) token++",
        "< point) token++",
    ),
    (
        "the point is of the unfiltered mass",
        SAMPLE,
        "total += kept_mass(c, min_p, c->logits[i])",
        "total += mass_of(c, c->logits[i])",
    ),
    (
        "the draw is cut to 32 bits",
        SAMPLE,
        "fraction_of(uniform, total)",
        "fraction_of(uniform >> 32 << 32, total)",
    ),
    ("greedy rows are drawn", SAMPLE, "row->scale == 0.0f || ", ""),
    ("every row takes the first row's parameters", SAMPLE, "&a->rows[index]", "&a->rows[0]"),
    ("nine rounds", UNIFORM, "ROUNDS = 10", "ROUNDS = 9"),
    ("the choice does not enter", UNIFORM, "(uint32_t)choice, 0, 0}", "0, 0, 0}"),
    ("the position does not enter", UNIFORM, "{(uint32_t)position,", "{0,"),
    ("half of the seed", UNIFORM, "(uint32_t)(seed >> 32)", "0"),
    (
        "the words exchanged",
        UNIFORM,
        "counter[1] << 32 | counter[0]",
        "counter[0] << 32 | counter[1]",
    ),
    ("the bias subtracted", EDITS, "*logit + edit->bias", "*logit - edit->bias"),
    (
        "repetition divides every logit",
        EDITS,
        "x > 0.0f ? x / row->repetition_penalty : x * row->repetition_penalty",
        "x / row->repetition_penalty",
    ),
    ("repetition for what was not seen", EDITS, "edit->flags & EDIT_SEEN", "1"),
    ("frequency counts once", EDITS, "(float)edit->count *", "(float)(edit->count > 0) *"),
    ("presence for the prompt too", EDITS, "if (edit->count > 0) x", "x"),
    ("a ban is only a low value", EDITS, "-INFINITY : x", "-1e4f : x"),
    (
        "the edits stay",
        EDITS,
        "edits[i].token_id] = saved[i];",
        "edits[i].token_id] += 0 * saved[i];",
    ),
    (
        "the edits of another row",
        CHOOSE,
        "host_edits[count] = (LogitEdit){i,",
        "host_edits[count] = (LogitEdit){0,",
    ),
    ("rank from 0", SCORE, ".rank = 1}", ".rank = 0}"),
    ("ties to the higher id", SCORE, "return a < b;", "return a > b;"),
    ("scores at the row's temperature", SCORE, "numerics_constant(LOG2_E)", "row->scale"),
    (
        "the scored token is always the chosen one",
        SCORE,
        "row->scored_id < 0 ? a->ids[index] : row->scored_id",
        "a->ids[index]",
    ),
    ("log2 for ln", CHOOSE, "double log_mass = log(", "double log_mass = log2("),
    (
        "the alternatives of the row before",
        CHOOSE,
        "(size_t)row * s->max_logprobs + i",
        "(size_t)(row ? row - 1 : 0) * s->max_logprobs + i",
    ),
]


def compile_object(source: Path, target: Path, include: Path) -> None:
    subprocess.run(["cc", *FLAGS, f"-I{include}", "-c", source, "-o", target], check=True)


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin, compiled once: <folder>/<file>.c.o of a copy of its sources."""
    if shutil.which("cc") is None:
        pytest.skip("requires a C compiler")
    root = tmp_path_factory.mktemp("sampling_faults")
    shutil.copytree(CSRC, root / "csrc")
    for source in sources(root):
        compile_object(source, source.with_suffix(".o"), source.parent)
    return root


def sources(root: Path) -> list[Path]:
    csrc = root / "csrc"
    found = [p for folder in ("twin", "model", "runtime") for p in (csrc / folder).glob("*.c")]
    return [*sorted(found), csrc / "kernels" / "no_cuda.c"]


def link(root: Path, name: str, replaced: dict[Path, Path]) -> Path:
    library = root / f"{name}.so"
    parts = [replaced.get(s, s.with_suffix(".o")) for s in sources(root)]
    subprocess.run(["cc", "-shared", "-pthread", "-o", library, *parts, "-lm"], check=True)
    return library


def build(root: Path, number: int, file: str, before: str, after: str) -> Path:
    """A library with one fault in it."""
    path = root / "csrc" / file
    text = path.read_text()
    assert text.count(before) == 1, f"{before!r} must occur once in {file}"
    users = [path] if path.suffix == ".c" else [root / "csrc" / f for f in (SAMPLE, SCORE)]
    replaced = {user: root / f"{number}_{user.name}.o" for user in users}
    path.write_text(text.replace(before, after))
    try:
        for user, target in replaced.items():
            compile_object(user, target, user.parent)
    finally:
        path.write_text(text)
    return link(root, f"fault_{number}", replaced)


def differs(ops: Ops) -> bool:
    """Whether these operations give anything that the page does not say."""
    return any(check(ops) for check in (draws_differ, uniforms_differ, edits_differ, scores_differ))


def draws_differ(ops: Ops) -> bool:
    rng = np.random.default_rng(0)
    settings = [
        (t, k, p, m)
        for t in (0.5, 1.0)
        for k in (0, 1, 3, 8)
        for p in (1.0, 0.7, 0.5)
        for m in (0.0, 0.3, 1.0)
    ] + [(page.EXACT, 0, 0.5, 0.0), (page.EXACT, 0, 0.75, 0.0)]
    logits_of = [
        *page.BORDERS_OF_TOP_P,
        np.array([0, 0, -0.0, 0.0], np.float32),  # exact shares: top_p of a half
        np.array([2, -0.0, 0.0, 0, -1, -3, -2, 1.5], np.float32),
        rng.standard_normal(8).astype(np.float32),
        np.array([3, 3, 1, 1, 1, -5, -6, -40], np.float32),
    ]
    for logits in logits_of:
        logits_rows, fields, uniforms, expected = [], [], [], []
        for temperature, top_k, top_p, min_p in settings:
            masses = page.kept_masses(logits, temperature, top_k=top_k, top_p=top_p, min_p=min_p)
            for u in page.borders(masses):
                logits_rows.append(logits)
                fields.append((temperature, top_k, top_p, min_p))
                uniforms.append(u)
                expected.append(page.drawn(masses, u))
        columns = dict(
            zip(("temperature", "top_k", "top_p", "min_p"), zip(*fields, strict=True), strict=True)
        )
        batch = page.sampling(page.rows(len(fields), **columns))
        drawn = ops.sample(np.array(logits_rows), batch, np.array(uniforms, np.uint64))[0]
        if drawn.tolist() != expected:
            return True
    greedy = page.sampling(page.rows(1, temperature=0))
    row = np.array([[1.0, 0.99]], np.float32)
    return ops.sample(row, greedy, np.array([page.U_MAX], np.uint64))[0].tolist() != [0]


def uniforms_differ(ops: Ops) -> bool:
    seeds = np.array([0, 1, 2**40 + 3, 2**64 - 1], np.uint64)
    positions, choices = np.array([0, 7, 1000, 2**31 - 1], np.int32), np.arange(4, dtype=np.int32)
    keys = zip(seeds.tolist(), positions.tolist(), choices.tolist(), strict=True)
    return ops.uniform(seeds, positions, choices).tolist() != [page.philox(*key) for key in keys]


def edits_differ(ops: Ops) -> bool:
    rows = page.rows(
        2, repetition_penalty=1.7, frequency_penalty=0.3, presence_penalty=0.6, num_edits=6
    )
    one_row = [(0, 3, 0.5, 1), (1, 0, 0.0, 1), (2, 2, -4.0, 1), (3, 0, 2.0, 0), (4, 0, 0, 2),
               (5, 1, 0.0, 1)]  # fmt: skip
    edits = np.array([*one_row, *((i + 1, *rest) for i, *rest in one_row)], EDIT)
    logits = np.array([[1, -1, 2, 0.5, 9, -3, 4], [2, 1, -1, 3, 0.25, -7, 5]], np.float32)
    expected = [page.edited(logits[i], rows[i], edits[6 * i : 6 * i + 6]) for i in range(2)]
    batch = page.sampling(rows, edits)
    return ops.edit_logits(logits, batch).tobytes() != np.array(expected).tobytes()


def scores_differ(ops: Ops) -> bool:
    logits = np.array([[1, 3, 3, -2], [0.5, 0.25, -1, 4]], np.float32)
    edits = np.array([(1, 0, 0, 2), (3, 0, 0, 2), (0, 0, 9.0, 0)], EDIT)
    rows = page.rows(2, temperature=[0.5, 0], num_logprobs=4, scored_id=[-1, 2], num_edits=[1, 2])
    ids, found = ops.sample(logits, page.sampling(rows, edits, 4), np.zeros(2, np.uint64))
    assert found is not None
    truth = logits - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    order = [sorted(range(4), key=lambda i, row=row: (-row[i], i)) for row in logits.tolist()]
    scored = [int(ids[0]), 2]
    ranks = [order[i].index(scored[i]) + 1 for i in range(2)]
    listed = np.take_along_axis(truth, np.array(order), axis=1)
    # One rounding to float32 of a value below 32 is 2^-20 at most; four of them.
    return (
        ids.tolist() != [0, 0]
        or found.token_ranks.tolist() != ranks
        or found.top_ids.tolist() != order
        or not np.allclose(found.top_logprobs, listed, rtol=0, atol=4e-6)
        or not np.allclose(found.token_logprobs, truth[[0, 1], scored], rtol=0, atol=4e-6)
    )


@pytest.fixture
def open_ops() -> Iterator:
    opened: list[Ops] = []

    def make(path: Path) -> Ops:
        opened.append(Ops(Library(path), "cpu", 1))
        return opened[-1]

    yield make
    for ops in opened:
        ops.close()


def test_the_code_as_it_is_passes(objects: Path, open_ops):
    assert not differs(open_ops(link(objects, "unchanged", {})))


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(FAULTS)), ids=[fault[0] for fault in FAULTS])
def test_a_fault_is_found(objects: Path, open_ops, number: int):
    _, file, before, after = FAULTS[number]

    assert differs(open_ops(build(objects, number, file, before, after)))
