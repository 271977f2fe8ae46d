"""Whole models on both devices of this machine: every tap of the longest prompts, bit for bit.

What golden/h200 lets any CPU check later, checked where the GPU is: the two longest prompts of each
record, up to 2100 tokens of the trained model and 512 of the real shape, and one of 8300 tokens on
every toy.
"""

import pytest

from engine.bindings import Library
from engine.errors import CheckpointError
from engine.models import resolve
from engine.ops import Ops
from engine.sources import toy
from verification.gpu_bits import (
    LONG_PROMPT,
    MODELS,
    differences,
    model_bits,
    num_taps,
    recorded_prompts,
)

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("name", MODELS)
def test_every_tap_of_the_longest_prompts_has_the_twins_bits(library: Library, gpu: Ops, name: str):
    try:
        directory = resolve(name)
    except CheckpointError as error:
        pytest.skip(f"requires {name}: {error}")
    by_length = sorted(recorded_prompts(name, directory), key=lambda p: len(p.token_ids))
    prompts = by_length[-2:]
    if name in toy.CONFIGS and LONG_PROMPT not in prompts:
        prompts.append(LONG_PROMPT)

    found, expected = (model_bits(name, directory, prompts, d, library) for d in ("cuda", "cpu"))

    assert differences(found, expected) == []
    assert num_taps(found) >= 33 * len(prompts)
