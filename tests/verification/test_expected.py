import gc
import weakref
from dataclasses import replace
from types import SimpleNamespace

import torch

from verification.expected import LayerTruth
from verification.passes import LOCAL, PREFILL, Pass

ROWS, WIDTH = 3, 4


class Weights:
    """Random weights, as a reference gives them."""

    def weight(self, name: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(len(name))
        return torch.randn(WIDTH, WIDTH, generator=generator).bfloat16()


def run_of(value: float) -> Pass:
    inputs = {("attn_norm", 0): torch.full((ROWS, WIDTH), value).bfloat16()}
    index = torch.arange(ROWS)
    return Pass(LOCAL, PREFILL, (), index, index, index, inputs, {}, keys=lambda layer, i: ())


def truth() -> LayerTruth:
    return LayerTruth(Weights(), SimpleNamespace(num_layers=1, head_dim=64), 0, None)


def test_results_that_wait_are_those_of_their_own_pass_in_any_order():
    one, two = run_of(1), run_of(2)
    mixed = truth()

    mixed.expect("q", one)
    mixed.expect("q", two)
    found = [mixed.expect("k", two).value, mixed.expect("k", one).value]

    alone = [truth().expect("k", run).value for run in (two, one)]
    assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_a_pass_whose_results_wait_is_kept_so_that_no_other_takes_its_identity():
    mixed, run = truth(), run_of(1)
    mixed.expect("q", run)
    kept = weakref.ref(run)

    del run
    gc.collect()
    assert kept() is not None

    mixed.expect("k", kept())
    mixed.expect("v", kept())
    gc.collect()
    assert kept() is None


def test_an_equal_pass_that_is_another_has_no_claim_on_what_waits():
    run = run_of(1)
    mixed = truth()
    mixed.expect("q", run)

    other = replace(run, inputs=run_of(3).inputs)

    assert torch.equal(mixed.expect("k", other).value, truth().expect("k", run_of(3)).value)
