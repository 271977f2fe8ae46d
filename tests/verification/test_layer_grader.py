"""The replay is held to transformers too: where both differ, right outputs do not hide it."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.config import ModelConfig
from engine.models import resolve
from verification.engine_runs import group_prompt
from verification.expected import LayerTruth, RopeRows
from verification.layer_grader import LayerGrader
from verification.localise import Finding
from verification.oracle import Reference
from verification.passes import Pass
from verification.rounding import neighbour
from verification.verify_op.passes import prefill_pass

TAPS = ("attn_norm", "q_rope", "act", "attn_residual")  # attention rounds more than it may
IDS = [1, 5, 9, 2, 7, 3, 3, 8, 200, 17, 4, 11]


@pytest.fixture(scope="module")
def graded() -> Iterator:
    """Grades a pass whose engine is transformers itself, altered by a test."""
    directory = resolve("toy")
    reference, config = Reference(directory, torch.bfloat16), ModelConfig.from_directory(directory)
    trace = reference.run(IDS, [len(IDS) - 1])
    run = prefill_pass([group_prompt("a", IDS, 1)], trace)
    rope = RopeRows(torch.cat(reference.rope_table(range(len(IDS))), 1), True)

    def grade(alter) -> list[Finding]:
        truth = LayerTruth(reference, config, 0, rope)
        grader = LayerGrader(reference, config, truth, 0, lambda tap, layer: tap in TAPS)
        grader.grade([alter(replace(run, outputs=trace))])
        return grader.findings

    with torch.inference_mode():
        yield grade


def test_transformers_own_values_pass(graded):
    assert graded(lambda run: run) == []


@pytest.mark.parametrize("tap", TAPS)
def test_where_transformers_is_not_the_replay_it_is_told(graded, tap: str):
    def alter(run: Pass) -> Pass:
        theirs = run.reference[tap, 0].clone()
        theirs[5, 7] = neighbour(theirs[5, 7], 1)
        return replace(run, reference={**run.reference, (tap, 0): theirs})

    (finding,) = graded(alter)

    assert (finding.tap, finding.layer) == (tap, 0)
    assert "transformers" in finding.verdict.reason
    assert (finding.element.row, finding.element.column) == (5, 7)
