"""Sampling through the engine: the door, and each parameter's effect on a real model's tokens."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from engine.batch import Batch, SequenceSlice, build_batch
from engine.errors import InvalidArgument
from engine.model_runner import ModelRunner
from engine.sampling import (
    EDIT,
    IgnoredRow,
    Logprobs,
    PromptToken,
    SamplingBatch,
    SequenceSampler,
    build_sampling,
)
from engine.sampling_params import SamplingParams
from engine.sampling_struct import fill_sampling
from tests.devices import skipped_without_device
from tests.system.trace import tokens
from tests.twin import sampling_contract as page
from tests.twin.bits import assert_same_bits

PROMPT = tokens(0, 20)
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def runner(request: pytest.FixtureRequest, make_runner: Callable[..., ModelRunner]) -> ModelRunner:
    with skipped_without_device():
        return make_runner("toy", num_blocks=24, max_seq_len=64, device=request.param)


def prefill(count: int = 1) -> Batch:
    """The same prompt so many times, each on blocks of its own."""
    slices = [SequenceSlice(PROMPT, 0, [3 * i, 3 * i + 1, 3 * i + 2]) for i in range(count)]
    return build_batch(slices, 16)


def sampler(params: SamplingParams, seed: int = 0, **more: object) -> SequenceSampler:
    return SequenceSampler(params, PROMPT, seed, **more)


def generate(runner: ModelRunner, params: SamplingParams, seed: int = 0, **more) -> list[int]:
    """Twelve tokens of the prompt's answer, one sequence alone."""
    state, ids, start, answer = sampler(params, seed, **more), PROMPT, 0, []
    for _ in range(12):
        batch = build_batch([SequenceSlice(ids, start, [0, 1, 2])], 16)
        output = runner.forward(batch, sampling=build_sampling([state]), wants_logits=False)
        start += len(ids)
        ids = output.next_ids.tolist()
        answer += ids
        state.append(ids[0])
    return answer


class TestEachParameterChangesTheTokens:
    def test_greedy_is_what_it_was_without_sampling(self, runner: ModelRunner):
        plain = generate(runner, GREEDY)
        state = SamplingParams(temperature=0, logprobs=0)  # arrays, but no other choice

        assert generate(runner, state) == plain

    @pytest.mark.parametrize(
        "change",
        [
            {"temperature": 0.2},
            {"top_k": 3},
            {"top_p": 0.2},
            {"min_p": 0.8},
            {"repetition_penalty": 50},
            {"presence_penalty": -2, "temperature": 0.3},
            {"frequency_penalty": -2, "temperature": 0.3},
            {"logit_bias": {5: 100}},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_drawn_tokens(self, runner: ModelRunner, change: dict):
        base = {"temperature": change["temperature"]} if len(change) > 1 else {}

        assert generate(runner, SamplingParams(**change)) != generate(
            runner, SamplingParams(**base)
        )

    def test_the_seed_and_the_choice(self, runner: ModelRunner):
        params = SamplingParams()
        answers = [
            generate(runner, params, seed=1),
            generate(runner, params, seed=2),
            generate(runner, params, seed=1, choice=1),
        ]

        assert len({tuple(answer) for answer in answers}) == 3
        assert generate(runner, params, seed=1) == answers[0]

    def test_logit_bias_chooses_and_forbids(self, runner: ModelRunner):
        first = generate(runner, GREEDY)[0]

        assert generate(runner, SamplingParams(temperature=0, logit_bias={17: 100})) == [17] * 12
        assert first not in generate(
            runner, SamplingParams(temperature=0, logit_bias={first: -100})
        )

    @pytest.mark.parametrize("how", ["eos_token_ids", "stop_token_ids", "ignore_eos"])
    def test_min_tokens_keeps_the_ends_away(self, runner: ModelRunner, how: str):
        # the model wants `end`; nothing else is let to its place before five others
        end = generate(runner, GREEDY)[0]
        bias = {end: 100.0}
        eos = () if how == "stop_token_ids" else (end,)
        stop = (end,) if how == "stop_token_ids" else ()
        params = SamplingParams(
            temperature=0, logit_bias=bias, min_tokens=5, stop_token_ids=stop,
            ignore_eos=how == "ignore_eos",
        )  # fmt: skip

        answer = generate(runner, params, eos_token_ids=eos)

        if how == "ignore_eos":  # no end at all, so nothing to keep away
            assert answer == [end] * 12
        else:
            assert end not in answer[:5] and answer[5:] == [end] * 7

    def test_logprobs_of_the_token_and_of_others(self, runner: ModelRunner):
        batch = build_sampling([sampler(SamplingParams(logprobs=3))])
        output = runner.forward(prefill(), sampling=batch)

        assert output.logprobs is not None
        logits = output.logits[0].astype(np.float64)
        truth = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        best = np.argsort(-logits, kind="stable")[:3]
        assert output.logprobs.top_ids.tolist() == [best.tolist()]
        assert np.abs(output.logprobs.top_logprobs[0] - truth[best]).max() < 2e-6
        assert abs(output.logprobs.token_logprobs[0] - truth[output.next_ids[0]]) < 2e-6
        assert runner.forward(prefill(), sampling=None).logprobs is None

    def test_prompt_logprobs_are_of_the_tokens_that_follow(self, runner: ModelRunner):
        batch = build_batch([SequenceSlice(PROMPT, 0, [0, 1])], 16, "all")
        rows = [PromptToken(token_id, 2) for token_id in PROMPT[1:]]

        output = runner.forward(batch, sampling=build_sampling([*rows, IgnoredRow()]))

        assert output.logprobs is not None
        logits = output.logits.astype(np.float64)
        shifted = logits - logits.max(-1, keepdims=True)
        truth = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        expected = truth[np.arange(len(rows)), PROMPT[1:]]
        assert np.abs(output.logprobs.token_logprobs[:-1] - expected).max() < 2e-6
        assert np.isnan(output.logprobs.token_logprobs[-1])
        assert (output.next_ids == logits.argmax(-1)).all()


def test_logits_and_taps_do_not_see_the_edits(runner: ModelRunner):
    expected = runner.forward(prefill()).logits
    params = SamplingParams(logit_bias={i: 50.0 for i in range(0, 320, 3)}, repetition_penalty=9)

    for _ in range(2):  # nor does the next step
        output = runner.forward(prefill(), sampling=build_sampling([sampler(params)]))
        assert_same_bits(output.logits, expected)


def test_a_request_gets_its_tokens_whoever_rides_along(runner: ModelRunner):
    params = [
        SamplingParams(top_p=0.9, logprobs=4),
        GREEDY,
        SamplingParams(temperature=2, repetition_penalty=1.5, logit_bias={3: 2}),
        SamplingParams(top_k=4, presence_penalty=1, logprobs=1),
    ]
    states = [sampler(p, seed=i, output_ids=[7, 7, i]) for i, p in enumerate(params)]
    alone = [
        runner.forward(prefill(), sampling=build_sampling([state])).next_ids[0] for state in states
    ]

    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 1, 3]):
        output = runner.forward(
            prefill(4), sampling=build_sampling([states[i] for i in order])
        )  # fmt: skip
        assert output.next_ids.tolist() == [alone[i] for i in order]


def test_more_rows_than_the_logits_buffer_holds(runner: ModelRunner):
    # slices of logits_rows = 16 rows: each must find its own edits and scores
    batch = build_batch([SequenceSlice(PROMPT * 2, 0, [0, 1, 2])], 16, "all")
    rows = [
        sampler(SamplingParams(temperature=0, logit_bias={i: 100.0, 300: 1.0}, logprobs=1))
        for i in range(40)
    ]

    output = runner.forward(batch, sampling=build_sampling(rows))

    assert output.next_ids.tolist() == list(range(40))
    assert output.logprobs is not None
    assert output.logprobs.top_ids[:, 0].tolist() == output.logits.argmax(-1).tolist()


def test_scores_come_without_next_ids(runner: ModelRunner):
    logprobs = Logprobs.empty(1, 0)
    sampling = page.sampling(page.rows(1, temperature=0, num_logprobs=0), max_logprobs=0)

    runner.engine.forward(prefill(), sampling=sampling, logprobs=logprobs)

    assert logprobs.token_ranks.tolist() == [1]


@pytest.mark.parametrize("asks", [0, 1, 2])
def test_scores_come_whichever_row_alone_asks_for_them(runner: ModelRunner, asks: int):
    logprobs = Logprobs.empty(3, 0)
    wanted = [0 if row == asks else -1 for row in range(3)]
    # One row more than the step has: what lies behind the last must not be asked.
    rows = page.rows(4, temperature=0, num_logprobs=[*wanted, -1])

    runner.engine.forward(
        prefill(3), sampling=page.sampling(rows[:3], max_logprobs=0), logprobs=logprobs
    )

    assert logprobs.token_ranks[asks] == 1
    assert logprobs.token_logprobs[asks] < 0


def edit(**fields: object) -> np.ndarray:
    result = np.zeros(2, EDIT)
    result["token_id"] = 4, 5
    for name, value in fields.items():
        result[name][1] = value
    return result


def with_first_edits(rows: np.ndarray, first: Sequence[int]) -> np.ndarray:
    rows["first_edit"] = first
    return rows


# A row's field, an illegal value, and the end of the message.
BAD_ROWS = [
    ("temperature", -1, "-1, must be 1e-05 .. 100"),
    ("temperature", 9e-6, "9e-06, must be"),
    ("temperature", np.nan, "nan, must be"),
    ("temperature", np.inf, "inf, must be"),
    ("top_p", 0, "0, must be 1e-06 .. 1"),
    ("top_p", 1.001, "1.001, must be"),
    ("top_p", np.nan, "nan, must be"),
    ("min_p", -0.1, "-0.1, must be 0 .. 1"),
    ("min_p", np.nan, "nan, must be"),
    ("top_k", -1, "-1, must be 0 .. 2147483647"),
    ("repetition_penalty", 0, "0, must be 0.01 .. 100"),
    ("repetition_penalty", np.nan, "nan, must be"),
    ("presence_penalty", 2.5, "2.5, must be -2 .. 2"),
    ("frequency_penalty", -np.inf, "-inf, must be -2 .. 2"),
    ("position", -1, "-1, must be 0 .. 2147483647"),
    ("choice", -1, "-1, must be 0 .. 2147483647"),
    ("num_logprobs", -2, "-2, must be -1 .. 3"),
    ("num_logprobs", 4, "4, must be -1 .. 3"),
    ("scored_id", -2, "-2, must be -1 .. 319"),
    ("scored_id", 320, "320, must be -1 .. 319"),
    ("num_edits", -1, "-1, must be 0 .. 320"),
    ("num_edits", 321, "321, must be 0 .. 320"),
    ("first_edit", -1, "-1, must be 0 .. 0"),
    ("first_edit", 1, "1, must be 0 .. 0"),
]
BAD_EDITS = [
    ("token_id", -1, r"edits\[1\].token_id is -1, must be 0 .. 319"),
    ("token_id", 320, r"edits\[1\].token_id is 320, must be 0 .. 319"),
    ("token_id", 4, r"edits\[1\].token_id is 4, which its row already has"),
    ("count", -1, r"edits\[1\].count is -1, must be at least 0"),
    ("bias", 100.5, r"edits\[1\].bias is 100.5, must be -100 .. 100"),
    ("bias", np.nan, r"edits\[1\].bias is nan"),
    ("flags", 4, r"edits\[1\].flags is 4, must be 0 .. 3"),
    ("flags", -1, r"edits\[1\].flags is -1"),
]


def assert_refused(runner: ModelRunner, sampling: SamplingBatch, message: str) -> None:
    good = runner.forward(prefill(2))
    runner.fill_blocks(range(6), 0x3C00)
    before = runner.read_kv(0, np.arange(96, dtype=np.int32))

    with pytest.raises(InvalidArgument, match=message):
        runner.forward(prefill(2), sampling=sampling)

    after = runner.read_kv(0, np.arange(96, dtype=np.int32))
    for left, right in zip(after, before, strict=True):
        assert_same_bits(left, right)  # nothing was computed
    again = runner.forward(prefill(2), sampling=page.sampling(page.rows(2, temperature=0)))
    assert_same_bits(again.logits, good.logits)
    assert again.next_ids.tolist() == good.next_ids.tolist()


class TestTheDoor:
    @pytest.mark.parametrize(("field", "value", "message"), BAD_ROWS)
    def test_a_rows_field(self, runner: ModelRunner, field: str, value: float, message: str):
        rows = page.rows(2, num_logprobs=0)
        rows[field][1] = value

        assert_refused(
            runner,
            page.sampling(rows, max_logprobs=3),
            rf"sampling.rows\[1\].{field} is {message}",
        )

    @pytest.mark.parametrize(("field", "value", "message"), BAD_EDITS)
    def test_an_edits_field(self, runner: ModelRunner, field: str, value: float, message: str):
        rows = page.rows(2, num_edits=[2, 0])

        assert_refused(runner, page.sampling(rows, edit(**{field: value})), message)

    def test_the_same_token_in_two_rows_is_no_error(self, runner: ModelRunner):
        rows = page.rows(2, num_edits=1)
        edits = edit(token_id=4)

        for _ in range(2):  # the scratch is clean again
            runner.forward(prefill(2), sampling=page.sampling(rows, edits))

    @pytest.mark.parametrize("again", [0, 1])
    def test_more_rows_with_edits_than_the_scratch_has_marks(
        self, make_runner: Callable[..., ModelRunner], again: int
    ):
        # Row 255 has the mark of row 0; what that one marked must be forgotten, and only that.
        rows, edits = page.rows(300, num_edits=1), np.zeros(301, EDIT)
        edits["token_id"] = 4
        edits["token_id"][[0, 255]] = 7
        edits["token_id"][256] = 7 if again else 4
        rows["num_edits"][255] = 2
        batch = build_batch([SequenceSlice([1] * 300, 0, list(range(19)))], 16, "all")
        runner = make_runner(num_blocks=19, max_seq_len=300, max_num_tokens=300)
        sampling = page.sampling(with_first_edits(rows, range(300)), edits)

        if again:
            with pytest.raises(InvalidArgument, match=r"edits\[256\].token_id is 7, which its row"):
                runner.forward(batch, sampling=sampling)
        else:
            runner.forward(batch, sampling=sampling)

    def test_edits_of_rows_lie_anywhere(self, runner: ModelRunner):
        edits = np.zeros(9, EDIT)
        edits["token_id"], edits["bias"] = [9, 5, 9, 9, 9, 9, 7, 3, 9], 100
        edits["bias"][[0, 2, 3, 4, 5, 8]] = np.nan  # nobody's: neither checked nor used
        rows = page.rows(2, temperature=0, num_edits=[2, 1])

        output = runner.forward(
            prefill(2), sampling=page.sampling(with_first_edits(rows, [6, 1]), edits)
        )

        edits["bias"][7] = 99
        logits = output.logits + 0
        logits[0, [7, 3]] += 100
        logits[1, 5] += 100
        assert output.next_ids.tolist() == logits.argmax(-1).tolist()

    def test_rows_may_share_edits(self, runner: ModelRunner):
        rows = page.rows(2, temperature=0, num_edits=[2, 1])

        output = runner.forward(
            prefill(2), sampling=page.sampling(with_first_edits(rows, [0, 1]), edit(bias=100.0))
        )

        assert output.next_ids.tolist() == [5, 5]

    def test_a_refused_edit_leaves_the_scratch_clean(self, runner: ModelRunner):
        rows = page.rows(2, num_edits=[2, 0])
        assert_refused(runner, page.sampling(rows, edit(count=-1)), "count is -1")

        runner.forward(prefill(2), sampling=page.sampling(rows, edit()))

    @pytest.mark.parametrize(("first", "count"), [(2, 1), (1, 2), (0, 3)])
    def test_edits_that_are_not_there(self, runner: ModelRunner, first: int, count: int):
        rows = with_first_edits(page.rows(2, num_edits=[1, count]), [1, first])

        assert_refused(
            runner,
            page.sampling(rows, edit()),
            rf"rows\[1\] has {count} edits from {first} on, but sampling.num_edits is 2",
        )

    def test_outputs_that_are_missing(self, runner: ModelRunner):
        rows = page.rows(2, num_logprobs=[-1, 0])

        assert_refused(
            runner, page.sampling(rows), "num_logprobs is 0, but an output of scores is null"
        )

    def test_too_many_alternatives(self, runner: ModelRunner):
        rows = page.rows(2, num_logprobs=0)

        assert_refused(
            runner, page.sampling(rows, max_logprobs=21), "max_logprobs is 21, must be 0 .. 20"
        )

    @pytest.mark.parametrize("count", [1, 3])
    def test_rows_that_are_not_the_logits(self, runner: ModelRunner, count: int):
        assert_refused(
            runner,
            page.sampling(page.rows(count)),
            r"sampling.rows has shape \(\d,\), must be \(2,\)",
        )

    def test_null_rows(self, runner: ModelRunner):
        library = runner.library
        batch = prefill()
        struct = library.batch(batch)
        sampling = library.ffi.new("EngineSampling *")
        struct.sampling = sampling

        with pytest.raises(InvalidArgument, match="sampling.rows is null"):
            runner.engine._call("engine_forward", struct, library.ffi.NULL, 0)

    def test_null_edits(self, runner: ModelRunner):
        library = runner.library
        rows = page.rows(1, num_edits=1)
        batch = prefill()
        struct = library.batch(batch)
        sampling = fill_sampling(library, page.sampling(rows), None, 1)
        sampling.edits, sampling.num_edits = library.ffi.NULL, 1
        struct.sampling = sampling

        with pytest.raises(InvalidArgument, match="num_edits is 1, but edits is null"):
            runner.engine._call("engine_forward", struct, library.ffi.NULL, 0)

    def test_greedy_steps_in_a_row_take_no_sampling(self, runner: ModelRunner):
        library = runner.library
        batch, rows = build_batch([SequenceSlice([1], 0, [0])], 16), page.rows(1)
        struct = library.batch(batch)
        sampling = fill_sampling(library, page.sampling(rows), None, 1)
        struct.sampling = sampling
        ids = library.ffi.new("int32_t[1]")

        with pytest.raises(
            InvalidArgument, match="sampling is not null, but these steps are greedy"
        ):
            runner.engine._call("engine_decode", struct, 1, ids)
