"""Bias, penalties and bans: the page's operations one by one, and transformers' own processors."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.ops import Ops
from engine.sampling import EDIT, EDIT_BANNED, EDIT_SEEN, SequenceSampler, build_sampling
from engine.sampling_params import SamplingParams
from tests.twin import sampling_contract as page
from tests.twin.bits import assert_same_bits

VOCAB = 24
VALUE = st.sampled_from([0.0, -0.0, 1.0, -1.0, 3e38, -3e38, -math.inf, 1e-45]) | st.floats(
    -50, 50, width=32
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of a few rows, their sampling rows and edits."""
    count = draw(st.integers(1, 4))
    logits = np.array(
        [draw(st.lists(VALUE, min_size=VOCAB, max_size=VOCAB)) for _ in range(count)], np.float32
    )
    edits: list[tuple[int, int, float, int]] = []
    rows = page.rows(count)
    for row in rows:
        row["repetition_penalty"] = draw(st.sampled_from([1.0, 0.01, 1.3, 100.0]))
        row["frequency_penalty"] = draw(st.sampled_from([0.0, -2.0, 0.1, 2.0]))
        row["presence_penalty"] = draw(st.sampled_from([0.0, -2.0, 0.3, 2.0]))
        ids = draw(st.lists(st.integers(0, VOCAB - 1), unique=True, max_size=VOCAB))
        row["num_edits"] = len(ids)
        for token_id in ids:
            bias = draw(st.sampled_from([0.0, 100.0, -100.0]) | st.floats(-99, 99, width=32))
            edits.append((token_id, draw(st.integers(0, 5)), bias, draw(st.integers(0, 3))))
    return logits, rows, np.array(edits, EDIT)


@given(cases())
def test_every_edit_is_the_pages(twin: Ops, case: tuple):
    logits, rows, edits = case
    expected, first = [], 0
    for row, values in zip(rows, logits, strict=True):
        expected.append(page.edited(values, row, edits[first : first + row["num_edits"]]))
        first += row["num_edits"]

    assert_same_bits(twin.edit_logits(logits, page.sampling(rows, edits)), np.array(expected))


def edited(ops: Ops, logits: np.ndarray, params: SamplingParams, prompt, output=()) -> np.ndarray:
    """One row as the engine would see it after this prompt and answer."""
    batch = build_sampling([SequenceSampler(params, prompt, seed=0, output_ids=output)])
    assert batch is not None
    return ops.edit_logits(logits[None], batch)[0]


class TestAgainstTransformers:
    LOGITS = (np.random.default_rng(7).standard_normal(VOCAB) * 5).astype(np.float32)
    PROMPT, OUTPUT = [3, 4, 4, 9], [9, 20, 3]

    def processed(self, processor, ids: list[int]) -> np.ndarray:
        import torch

        return processor(torch.tensor([ids]), torch.from_numpy(self.LOGITS[None].copy()))[0].numpy()

    @pytest.mark.parametrize("penalty", [0.5, 1.3, 10.0])
    def test_repetition_penalty(self, twin: Ops, penalty: float):
        from transformers import RepetitionPenaltyLogitsProcessor

        expected = self.processed(
            RepetitionPenaltyLogitsProcessor(float(np.float32(penalty))), self.PROMPT + self.OUTPUT
        )
        params = SamplingParams(repetition_penalty=penalty)

        assert_same_bits(edited(twin, self.LOGITS, params, self.PROMPT, self.OUTPUT), expected)

    def test_logit_bias(self, twin: Ops):
        from transformers import SequenceBiasLogitsProcessor

        bias = {5: 2.5, 23: -7.25}
        expected = self.processed(
            SequenceBiasLogitsProcessor([[[i], b] for i, b in bias.items()]), self.PROMPT
        )

        assert_same_bits(
            edited(twin, self.LOGITS, SamplingParams(logit_bias=bias), self.PROMPT), expected
        )

    @pytest.mark.parametrize("num_output", [0, 2, 3])
    def test_min_tokens(self, twin: Ops, num_output: int):
        from transformers import MinNewTokensLengthLogitsProcessor

        output = self.OUTPUT[:num_output]
        expected = self.processed(
            MinNewTokensLengthLogitsProcessor(len(self.PROMPT), 3, [1, 6], device="cpu"),
            self.PROMPT + output,
        )
        params = SamplingParams(min_tokens=3, stop_token_ids=[1, 6])

        assert_same_bits(edited(twin, self.LOGITS, params, self.PROMPT, output), expected)


def test_penalties_take_as_much_as_they_say(twin: Ops):
    # frequency and presence count the answer alone: 9 twice in it, 3 once, 4 in the prompt only
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)

    after = edited(twin, np.zeros(VOCAB, np.float32), params, [3, 4], [9, 3, 9])

    expected = np.zeros(VOCAB, np.float32)
    expected[9], expected[3] = -1.0, -0.75
    assert_same_bits(after + np.float32(0), expected)


@pytest.mark.parametrize(
    ("flags", "count", "bias", "expected"),
    [
        (0, 0, 2.0, 3.0),
        (EDIT_SEEN, 0, 0.0, 0.5),
        (EDIT_SEEN, 0, -2.0, -2.0),  # -1 is multiplied
        (EDIT_SEEN, 3, 1.0, 1.0 - 3 * 0.25 - 0.125),
        (EDIT_BANNED, 0, 100.0, -math.inf),
        (EDIT_SEEN | EDIT_BANNED, 9, 0.0, -math.inf),
    ],
)
def test_an_edit_worked_out_by_hand(
    twin: Ops, flags: int, count: int, bias: float, expected: float
):
    rows = page.rows(
        1, repetition_penalty=2, frequency_penalty=0.25, presence_penalty=0.125, num_edits=1
    )
    edits = np.array([(1, count, bias, flags)], EDIT)

    out = twin.edit_logits(np.ones((1, 3), np.float32), page.sampling(rows, edits))

    assert_same_bits(out, np.array([[1, expected, 1]], np.float32))


def test_more_edits_than_are_staged_at_once_reach_their_rows(twin: Ops):
    # 256 rows of 320 edits are more than 65536: the rows go in groups
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((256, 320)).astype(np.float32)
    edits = np.zeros(256 * 320, EDIT)
    edits["token_id"] = np.tile(np.arange(320), 256)
    edits["flags"] = EDIT_BANNED
    allowed = rng.integers(0, 320, 256)
    edits["flags"][np.arange(256) * 320 + allowed] = 0
    batch = page.sampling(page.rows(256, num_edits=320), edits)

    ids, _ = twin.sample(logits, batch)

    assert ids.tolist() == allowed.tolist()
