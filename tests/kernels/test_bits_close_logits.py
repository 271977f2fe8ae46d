"""The arg-max of logits that differ by one unit in the last place, by none, or are below zero.

A model built by hand (tests/system/test_constructed_models.py): each token has two rivals at the
top, in one tile of the vocabulary or far apart, either one ahead by the smallest step or both
alike; the others lie below, and for every second token all logits are negative.
"""

from dataclasses import replace

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Engine, Library
from engine.config import EngineConfig
from engine.ops import Ops
from tests.kernels.inputs import assert_same_bits, to_bf16
from tests.system.test_constructed_models import ALWAYS, TOKENS, silent

pytestmark = pytest.mark.gpu

STEP = np.float32(2.0**-23)  # of a value with eight bits: at least one float32, at most two
PAIRS = ((0, 1), (62, 63), (63, 64), (0, 330), (127, 128), (7, 200), (300, 330), (64, 299))
LAST = 330
NUM_SEQS = (1, 2, 8, 9, 33, 96)


def rivals() -> tuple[np.ndarray, list[int]]:
    """The head [331, 128] and each token's arg-max; tokens are 0 .. 95, their signs alternate."""
    head = np.zeros((LAST + 1, 128), np.float32)
    head[1::2, ALWAYS] = -STEP  # the final norm's weight is -1: odd rows are a step ahead
    winners = []
    for token in range(TOKENS):
        one, other = PAIRS[token // 2 % len(PAIRS)]
        top, rest = (-1, 1) if token % 2 == 0 else (1, 2)  # times -1
        head[:, token] = rest
        head[[one, other], token] = top
        ahead = [row for row in (one, other) if row % 2 == 1] or [one, other]
        winners.append(min(ahead))
    return head, winners


def answers(library: Library, device: str, num_seqs: int) -> tuple[np.ndarray, np.ndarray]:
    config, weights = silent("toy-untied")
    weights["lm_head.weight"], _ = rivals()
    room = EngineConfig(device, num_seqs, 16, num_seqs, num_seqs, block_size=16)
    batch = build_batch([SequenceSlice([i % TOKENS], 0, [i]) for i in range(num_seqs)], 16)
    with Engine(library, replace(config, num_layers=1), room) as engine:
        for name, values in weights.items():
            if "layers.1." not in name:
                engine.load_weight(name, to_bf16(values))
        engine.finish_loading()
        logits = np.empty((num_seqs, config.vocab_size), np.float32)
        ids = np.empty(num_seqs, np.int32)
        engine.forward(batch, (), logits, ids)
        return logits, ids


@pytest.mark.parametrize("num_seqs", NUM_SEQS)
def test_the_arg_max_is_the_twins_however_close_its_rival(
    library: Library, gpu: Ops, num_seqs: int
):
    logits, ids = answers(library, "cuda", num_seqs)
    expected, expected_ids = answers(library, "cpu", num_seqs)

    assert_same_bits(logits, expected)
    assert ids.tolist() == expected_ids.tolist() == rivals()[1][:num_seqs]
