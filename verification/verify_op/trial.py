"""Holds one operation to every check of it and says what each found.

Decides which models and inputs are tried; every judgement is made in `compare`, by the graders of
the whole engine. Invariant: a check that could not be made, because the operation crashed or
refused, has failed; one whose model is not here is "not run".
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import EngineError
from engine.models import resolve
from verification import compare, measure
from verification.compare import NOT_RUN, Verdict
from verification.engine_runs import group_prompt
from verification.expected import Bounded, RopeRows
from verification.localise import Findings
from verification.operators import OperatorGrader
from verification.oracle import Reference, concatenated
from verification.probes import probe_group, probe_trace
from verification.replay import Replayed
from verification.results import Cell, Failure
from verification.state import StateGrader
from verification.taps import POINTS
from verification.verify_op.cases import Case, cases_of
from verification.verify_op.passes import run_operation
from verification.verify_op.process import Kernel, KernelError

TOYS = ("toy", "toy-untied", "toy-gqa3", "toy-plain-rope")
TRAINED = "smollm2-135m"
LENGTHS = (1, 2, 17, 33, 130)  # tokens; a tile and two keys
TRAINED_LENGTHS = (2, 17)  # thirty layers for a plain loop on one core
DECODE_TOKENS = 1

OPERATIONS = (
    *dict.fromkeys(point.operation for point in POINTS),
    "rope_table",
    "argmax",
)


@dataclass(frozen=True)
class Check:
    """One check and its numbers; None where the check has no such number."""

    name: str
    verdict: Verdict
    values: int = 0
    differing: int | None = None
    max_ulp: int | None = None
    ratio: float | None = None
    failure: Failure | None = None


def checks(
    kernel: Kernel,
    has_model: Callable[[str], bool],
    models: tuple[str, ...] = (*TOYS, TRAINED),
) -> Iterator[Check]:
    """Every check of the kernel's operation, as they are made.

    Args:
        has_model: whether a model may be used; a trained one is not fetched for this.
    """
    if kernel.operation != "argmax":
        for name in models:
            if not has_model(name):
                missing = "not in the model cache; make verify fetches it"
                yield Check(f"{name}, transformers' inputs", Verdict(NOT_RUN, missing))
                continue
            yield from _on_model(kernel, name)
    found = list(cases_of(kernel.operation))
    if found:
        yield from _on_cases(kernel, found)


def _on_model(kernel: Kernel, name: str) -> Iterator[Check]:
    directory = resolve(name)
    config = ModelConfig.from_directory(directory)
    reference = Reference(directory, torch.bfloat16)
    if kernel.operation == "rope_table":
        findings = Findings(config, "cpu")
        state = StateGrader(config, findings, lambda tap, layer: True)
        yield _guarded(
            f"{name}, transformers' cos and sin",
            findings,
            lambda: state.grade_rope_table(lambda count: kernel(config, count), reference),
            state.cells,
        )
        return
    words = f"{name}, transformers' inputs"
    lengths = TRAINED_LENGTHS if name == TRAINED else LENGTHS
    texts = [[(7 * i * i + 3 * i + n) % 256 for i in range(n)] for n in lengths]
    group = [group_prompt(f"len-{len(t)}", t, DECODE_TOKENS) for t in texts]
    trace = concatenated([reference.run(p.token_ids, p.logit_rows) for p in group])
    runs = [(words, group, trace, False)]
    if name == TOYS[0]:
        probes = probe_group(config, DECODE_TOKENS)
        runs.append((f"{name}, structured probes", probes, probe_trace(config, probes), True))
    for words, prompts, values, is_probe in runs:
        findings = Findings(config, "cpu")
        longest = max(p.num_tokens for p in prompts)
        rope = RopeRows(torch.cat(reference.rope_table(range(longest)), 1), True)
        wanted = kernel.operation
        taps = {point.name for point in POINTS if point.operation == wanted}
        grader = OperatorGrader(
            reference, config, rope, findings, lambda tap, layer, taps=taps: tap in taps
        )

        def grade(grader=grader, arguments=(config, reference, prompts, values, is_probe)) -> None:
            passes = run_operation(kernel, kernel.operation, *arguments)
            grader.grade(passes, lambda layer: None)

        yield _guarded(words, findings, grade, grader.cells)


def _guarded(name: str, findings: Findings, grade: Callable[[], None], cells: list[Cell]) -> Check:
    """A check by graders; what they could not grade has failed."""
    try:
        grade()
    except KernelError as error:
        return Check(name, compare.failed(str(error)))
    first = findings.first()
    verdict = compare.PASSED if first is None else compare.failed(first.message)

    def largest(field: str) -> float | None:
        return max((v for c in cells if (v := getattr(c, field)) is not None), default=None)

    differing = [c.differing for c in cells if c.differing is not None]
    return Check(
        name,
        verdict,
        sum(cell.values for cell in cells),
        sum(differing) if differing else None,
        largest("max_ulp"),
        largest("ratio"),
        first,
    )


def _on_cases(kernel: Kernel, found: list[Case]) -> Iterator[Check]:
    results: dict[str, np.ndarray] = {}
    assert len({case.name for case in found}) == len(found)
    yield _over(
        "boundary shapes, structured values, extremes",
        found,
        lambda case: _judge(case, results.setdefault(case.name, kernel(*case.arguments))),
    )
    known = [case for case in found if case.name in results]

    def again(case: Case) -> Verdict:
        for poison in ("infinity", "1e30"):
            other = kernel(*case.arguments, poison=poison)
            if other.tobytes() != results[case.name].tobytes():
                return compare.failed(
                    f"other bits with {poison} for NaN in memory that is not its own, or from "
                    "one call to the next"
                )
        return compare.PASSED

    yield _over("memory around every array: NaN, infinity, 1e30", known, again)
    if kernel.operation != "argmax":
        yield _over(
            "a row alone gives the bits it gives in a batch", known, _alone(kernel, results)
        )


def _alone(kernel: Kernel, results: dict[str, np.ndarray]) -> Callable[[Case], Verdict]:
    def judge(case: Case) -> Verdict:
        whole = results[case.name]
        row = len(whole) // 2
        single = kernel(*_row_of(kernel.operation, case.arguments, row))
        if single.tobytes() == whole[row : row + 1].tobytes():
            return compare.PASSED
        return compare.failed(f"row {row} alone has other bits than in the batch")

    return judge


def _row_of(operation: str, arguments: tuple[object, ...], row: int) -> list[object]:
    """The arguments of one row: those that have one are cut."""
    per_row = {
        "embedding": (1,),
        "rotary_embedding": (0, 2),
        "silu_and_mul": (0, 1),
        "residual_add": (0, 1),
    }.get(operation, (0,))
    return [
        np.ascontiguousarray(value[row : row + 1]) if index in per_row else value
        for index, value in enumerate(arguments)
    ]


def _over(name: str, cases: list[Case], judge: Callable[[Case], Verdict]) -> Check:
    """One check over many cases: its verdict is the first that is no pass."""
    verdict, num_failed = compare.PASSED, 0
    for case in cases:
        try:
            found = judge(case)
        except KernelError as error:
            found = compare.failed(str(error))
        if not found.passed:
            num_failed += 1
            if verdict.passed:
                verdict = compare.failed(f"{case.name}: {found.reason}")
    if num_failed > 1:
        verdict = compare.failed(f"{verdict.reason} ({num_failed} of {len(cases)} cases fail)")
    if not cases:
        verdict = compare.failed("no case gave a result")
    return Check(name, verdict, len(cases), num_failed)


def _judge(case: Case, result: np.ndarray) -> Verdict:
    expected = case.expected
    if isinstance(expected, Tensor):
        differing = int((torch.from_numpy(result).long() != expected).sum())
        return compare.judge_bits(differing, expected.numel(), "the lowest of the largest")
    shape = expected.value.shape
    if result.shape != tuple(shape):
        raise EngineError(f"{case.name}: shape {result.shape}, expected {tuple(shape)}")
    got = torch.from_numpy(result)
    got = got if got.dtype == torch.float32 else got.view(torch.bfloat16)
    if isinstance(expected, Bounded):
        is_signed = got.dtype == torch.bfloat16
        found = measure.bounded(expected.value, expected.budget, got, is_signed=is_signed)
        ratio = float(found.ratio.max())
        if not is_signed:
            return compare.judge_bounded(ratio)
        z = found.z_sums.total(slice(0, len(got)))
        return compare.judge_bounded(ratio, z, float(found.z_row.max()))
    got, width = got.reshape(-1, shape[-1]), shape[-1]
    flat = Replayed(expected.value.reshape(-1, width), expected.explain)
    found = measure.replayed(flat, got)
    differing, ulps = int(found.differing.sum()), int(found.max_ulp.max())
    if expected.explain is None:
        return compare.judge_bits(differing, got.numel(), "the replay")
    return compare.judge_replayed(differing, got.numel(), ulps, "the replay")
