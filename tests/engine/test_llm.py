"""Text in, text out, over the toy; what the steps do is `test_llm_engine.py`'s."""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace

import numpy as np
import pytest

import engine
from engine.bindings import Library
from engine.errors import DeviceUnavailable, InvalidArgument
from engine.llm import LLM
from engine.model_runner import ModelRunner
from engine.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(library: Library) -> Iterator[LLM]:
    room = {"kv_cache_memory_bytes": 1 << 22, "max_num_seqs": 4, "block_size": 16}
    with LLM("toy", device="cpu", library=library, **room) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _nothing_is_left(llm: LLM) -> Iterator[None]:
    yield
    assert not llm.engine.has_unfinished_requests()
    assert llm._inbox == {}
    llm.engine.scheduler.check_integrity()


def test_outputs_come_in_the_order_of_the_prompts(llm: LLM):
    prompts = ["one", "a second prompt", "3"]

    together = llm.generate(prompts, GREEDY)

    assert [output.prompt for output in together] == prompts
    for prompt, output in zip(prompts, together, strict=True):
        assert output.outputs == llm.generate(prompt, GREEDY)[0].outputs
        assert output.finished and len(output.outputs[0].token_ids) == 6


def test_static_batching_is_continuous_batching_with_one_arrival(llm: LLM):
    """More prompts than seats: the same answers as one after another."""
    prompts = [f"prompt {i}" for i in range(9)]

    assert [output.outputs for output in llm.generate(prompts, GREEDY)] == [
        llm.generate(prompt, GREEDY)[0].outputs for prompt in prompts
    ]


def test_token_ids_are_a_prompt_and_so_is_a_mapping(llm: LLM):
    ids = llm.tokenizer.encode("hello", add_bos=llm.tokenizer.adds_bos)

    outputs = [
        *llm.generate("hello", GREEDY),
        *llm.generate(ids, GREEDY),
        *llm.generate([ids], GREEDY),
        *llm.generate([{"prompt": "hello"}, {"prompt_token_ids": ids}], GREEDY),
    ]

    assert len(outputs) == 5
    assert len({output.outputs for output in outputs}) == 1


def test_each_prompt_may_have_its_own_parameters(llm: LLM):
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (1, 3)]

    outputs = llm.generate(["a", "b"], params)

    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 3]


def test_the_bar_counts_requests_on_a_terminal_and_is_silent_elsewhere(
    llm: LLM, monkeypatch, capsys
):
    llm.generate(["a", "b"], GREEDY)
    silent = capsys.readouterr().err
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes any stream for a terminal
    llm.generate(["a", "b"], GREEDY)
    shown = capsys.readouterr().err
    llm.generate(["a", "b"], GREEDY, use_tqdm=False)

    assert silent == "" and "2/2" in shown
    assert capsys.readouterr().err == ""


def test_looking_ahead_can_be_turned_off(library: Library, llm: LLM):
    room = {"kv_cache_memory_bytes": 1 << 22, "max_num_seqs": 4, "block_size": 16}
    with LLM("toy", device="cpu", library=library, async_scheduling=False, **room) as other:
        assert not other.engine.async_scheduling and llm.engine.async_scheduling
        assert other.generate("hi", GREEDY)[0].outputs == llm.generate("hi", GREEDY)[0].outputs


def test_no_prompts_no_outputs(llm: LLM):
    assert llm.generate([]) == []


def test_a_stream_gives_each_token_and_the_whole_at_the_end(llm: LLM):
    (whole,) = llm.generate("hello", GREEDY)

    outputs = list(llm.stream("hello", GREEDY))

    assert [len(output.outputs[0].token_ids) for output in outputs] == [1, 2, 3, 4, 5, 6]
    assert "".join(output.outputs[0].delta for output in outputs) == whole.outputs[0].text
    assert outputs[-1].outputs[0].token_ids == whole.outputs[0].token_ids


def test_what_a_stream_has_told_stays_as_it_was(llm: LLM):
    answers = [out.outputs[0] for out in llm.stream("hello", replace(GREEDY, logprobs=0))]

    whole = answers[-1]
    assert type(whole.token_ids) is type(whole.logprobs) is tuple
    for count, answer in enumerate(answers, start=1):
        assert answer.token_ids == whole.token_ids[:count]
        assert answer.logprobs == whole.logprobs[:count]


def test_streams_may_be_read_in_turns_and_left(llm: LLM):
    (whole,) = llm.generate("hello", GREEDY)
    first, second = llm.stream("other", GREEDY), llm.stream("hello", GREEDY)

    next(first)
    outputs = list(second)
    first.close()

    assert outputs[-1].outputs[0].text == whole.outputs[0].text


def test_one_bad_prompt_stops_the_call_and_leaves_nothing(llm: LLM):
    with pytest.raises(InvalidArgument, match=r"prompt\[0\] must be a token id"):
        llm.generate(["good", {"prompt_token_ids": [-1]}], GREEDY)


@pytest.mark.parametrize("name", ["sampling_params", "priority"])
def test_one_for_each_means_one_for_each(llm: LLM, name: str):
    value = {"sampling_params": [GREEDY], "priority": [0]}[name]

    with pytest.raises(InvalidArgument, match=f"{name} must be one or 2"):
        llm.generate(["a", "b"], **{name: value})


def test_n_answers_to_one_prompt_differ_and_come_again_with_the_seed(llm: LLM):
    params = SamplingParams(n=4, temperature=1.2, max_tokens=8, ignore_eos=True)

    (first,) = llm.generate("hello there, this is a prompt of several blocks", params)
    again = llm.generate(first.prompt, replace(params, seed=first.seed))[0]

    assert [answer.index for answer in first.outputs] == [0, 1, 2, 3]
    assert len({answer.token_ids for answer in first.outputs}) == 4
    assert first.outputs == again.outputs
    assert again.usage.num_completion_tokens == 32


def test_logprobs_are_of_the_tokens_and_of_the_prompt(llm: LLM):
    params = replace(GREEDY, logprobs=2, prompt_logprobs=1)

    (output,) = llm.generate("hello", params)

    answer = output.outputs[0]
    assert len(answer.logprobs) == len(answer.token_ids) == 6
    for token_id, scores in zip(answer.token_ids, answer.logprobs, strict=True):
        assert scores[token_id].rank == 1 and len(scores) == 2
    chosen = [s[t].logprob for t, s in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert answer.cumulative_logprob == pytest.approx(sum(chosen))
    assert output.prompt_logprobs[0] is None
    for token_id, scores in zip(
        output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True
    ):
        assert token_id in scores and min(score.rank for score in scores.values()) == 1
    plain = llm.generate("hello", GREEDY)[0].outputs[0]
    assert plain.token_ids == answer.token_ids and plain.logprobs is None


def test_a_prompts_logprobs_are_those_of_an_answer_forced_to_say_it(llm: LLM):
    """The score of a prompt's token is what the answer's token would have had there."""
    (said,) = llm.generate("hello", replace(GREEDY, logprobs=0))
    ids = [*said.prompt_token_ids, *said.outputs[0].token_ids]

    (read,) = llm.generate([ids], replace(GREEDY, prompt_logprobs=0, max_tokens=1))

    tail = read.prompt_logprobs[len(said.prompt_token_ids) :]
    assert [dict(scores) for scores in tail] == [dict(s) for s in said.outputs[0].logprobs]


DRAWN = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
COOL = replace(DRAWN, temperature=0.3)


def changes(text: str, ids: tuple[int, ...], eos: int) -> dict[str, tuple[SamplingParams, object]]:
    """Each parameter: what it is changed from, and to; what DRAWN answers is given."""
    banned = replace(DRAWN, stop_token_ids=ids[:1])
    stopped = replace(DRAWN, stop=text[3:5])
    return {
        "n": (DRAWN, 2),
        "temperature": (DRAWN, 0.1),
        "top_k": (DRAWN, 1),
        "top_p": (DRAWN, 0.01),
        "min_p": (DRAWN, 1.0),
        "repetition_penalty": (DRAWN, 100.0),
        "presence_penalty": (COOL, -2.0),
        "frequency_penalty": (COOL, -2.0),
        "logit_bias": (DRAWN, {65: 100.0}),
        "seed": (DRAWN, 6),
        "logprobs": (DRAWN, 0),
        "prompt_logprobs": (DRAWN, 0),
        "stop": (DRAWN, text[3:5]),
        "stop_token_ids": (DRAWN, ids[3:4]),
        "min_tokens": (banned, 4),
        "max_tokens": (DRAWN, 11),
        "ignore_eos": (replace(DRAWN, logit_bias={eos: 100.0}), False),
        "include_stop_str_in_output": (stopped, True),
    }


@pytest.mark.parametrize("name", [field.name for field in fields(SamplingParams)])
def test_every_parameter_changes_the_output(llm: LLM, name: str):
    drawn = llm.generate("hello", DRAWN)[0].outputs[0]
    eos = llm.model_config.eos_token_ids[0]
    before, value = changes(drawn.text, drawn.token_ids, eos)[name]

    outputs = [
        llm.generate("hello", params)[0] for params in (before, replace(before, **{name: value}))
    ]

    assert outputs[0].outputs == llm.generate("hello", before)[0].outputs  # and nothing else does
    seen = [(output.outputs, output.prompt_logprobs) for output in outputs]
    assert seen[0] != seen[1]


def test_a_stream_that_nobody_reads_is_left_like_any_other(llm: LLM):
    llm.stream("hello", GREEDY).close()


@pytest.mark.parametrize("min_tokens", [252, 2**31 - 1])
def test_an_end_that_is_banned_beyond_the_room_is_banned_to_its_last_token(
    llm: LLM, min_tokens: int
):
    eos = llm.model_config.eos_token_ids[0]
    params = SamplingParams(
        temperature=0, max_tokens=None, min_tokens=min_tokens, logit_bias={eos: 100.0}
    )
    ids = [65] * (llm.engine_config.max_seq_len - 4)

    (output,) = llm.generate(ids, params)

    answer = output.outputs[0]
    assert (len(answer.token_ids), answer.finish_reason) == (4, "length")
    assert eos not in answer.token_ids


def test_token_ids_may_be_numpys(llm: LLM):
    ids = llm.tokenizer.encode("hello", add_bos=llm.tokenizer.adds_bos)

    outputs = [*llm.generate(list(np.array(ids)), GREEDY), *llm.generate(np.array(ids), GREEDY)]

    assert len({output.outputs for output in [*outputs, *llm.generate("hello", GREEDY)]}) == 1


def test_a_model_whose_serving_is_refused_is_closed(library: Library, monkeypatch):
    closed = []
    monkeypatch.setattr(ModelRunner, "close", lambda runner: closed.append(runner.engine.close()))

    def refuse(*_: object, **__: object) -> None:
        raise InvalidArgument("no")

    monkeypatch.setattr("engine.llm.LLMEngine", refuse)
    with pytest.raises(InvalidArgument):
        LLM("toy", device="cpu", library=library, kv_cache_memory_bytes=1 << 22)

    assert len(closed) == 1


def test_a_with_block_closes_however_it_is_left(library: Library, monkeypatch):
    closed, close = [], ModelRunner.close
    monkeypatch.setattr(ModelRunner, "close", lambda runner: closed.append(close(runner)))
    room = {"kv_cache_memory_bytes": 1 << 22, "max_num_seqs": 4, "block_size": 16}

    with LLM("toy", device="cpu", library=library, **room):
        assert not closed
    with pytest.raises(KeyError), LLM("toy", device="cpu", library=library, **room):
        raise KeyError

    assert len(closed) == 2


@pytest.mark.parametrize("half", ["begin", "end"])
def test_an_interrupt_in_the_middle_of_a_step_leaves_a_model_that_answers(
    llm: LLM, monkeypatch, half: str
):
    (expected,) = llm.generate("hello", GREEDY)
    whole = getattr(llm.runner, half)

    def interrupted(*arguments: object, **options: object) -> object:
        monkeypatch.undo()
        if half == "begin":  # Ctrl-C is heard when the C call returns: the step has begun
            whole(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(llm.runner, half, interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate("hello", GREEDY)

    assert llm.generate("hello", GREEDY)[0].outputs == expected.outputs


def test_an_unknown_argument_is_refused(library: Library):
    with pytest.raises(InvalidArgument, match="no such argument.*tensor_parallel"):
        LLM("toy", device="cpu", library=library, tensor_parallel_size=2)


def test_auto_is_cuda_where_there_is_one_and_else_the_cpu(library: Library):
    with LLM("toy", library=library, kv_cache_memory_bytes=1 << 22) as llm:
        found = llm.engine_config.device
    try:
        LLM("toy", device="cuda", library=library, kv_cache_memory_bytes=1 << 22).close()
    except DeviceUnavailable:
        assert found == "cpu"
    else:
        assert found == "cuda"


def test_a_conversation_is_a_prompt(llm: LLM):
    with pytest.raises(engine.CheckpointError, match="no chat_template"):
        llm.chat([{"role": "user", "content": "hi"}], GREEDY)


@pytest.mark.parametrize("messages", [{"role": "user", "content": "hi"}, None, 3], ids=str)
def test_one_message_is_no_conversation(llm: LLM, messages: object):
    with pytest.raises(InvalidArgument, match="messages must be a list of messages"):
        llm.chat(messages, GREEDY)


def test_the_package_gives_the_api_without_loading_it():
    program = (
        "import sys, engine; assert 'numpy' not in sys.modules, 'numpy'; "
        "assert 'cffi' not in sys.modules; from engine import LLM, LLMEngine, SamplingParams; "
        "from engine import RequestOutput; print(LLM.__name__)"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.stdout, done.stderr) == ("LLM\n", "")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = engine.nothing
