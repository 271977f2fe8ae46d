import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from engine.__main__ import main
from engine.config import EngineConfig
from engine.errors import DeviceFailed, DeviceUnavailable, OutOfMemory
from tests.engine.test_generate import EOS, ScriptedRunner


class FakeModel(ScriptedRunner):
    """A runner that answers "hi é!" and can be told to fail."""

    def __init__(
        self,
        room: EngineConfig,
        failure: Exception | None = None,
        not_finite: dict[str, int] | None = None,
    ) -> None:
        super().__init__([*"hi é!".encode(), EOS])
        self.engine_config = room
        self.failure = failure
        self.not_finite = not_finite or {}
        self.is_closed = False

    def forward(self, batch, **options):
        if self.failure is not None:
            raise self.failure
        return super().forward(batch, **options)

    def __enter__(self):
        return self

    def __exit__(self, *exception: object) -> None:
        self.is_closed = True


class Factory:
    """Makes fake models, and keeps them and the rooms they were given."""

    def __init__(self, unavailable: tuple[str, ...] = ("cuda",), **settings) -> None:
        self.unavailable = unavailable
        self.settings = settings
        self.models: list[FakeModel] = []
        self.rooms: list[EngineConfig] = []

    def __call__(self, directory: Path, room: EngineConfig, progress) -> FakeModel:
        if room.device in self.unavailable:
            raise DeviceUnavailable(f"device {room.device}: not here")
        progress("loading weights", 1, 2)
        self.rooms.append(room)
        self.models.append(FakeModel(room, **self.settings))
        return self.models[-1]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path_factory.getbasetemp() / "engine-cache"  # shared: toys are made once
    monkeypatch.setenv("TOUCHSTONE_CACHE", str(root))


def generate(*arguments: str, factory: Factory | None = None) -> int:
    return main(["generate", "--model", "toy", *arguments], factory or Factory())


def test_the_answer_goes_to_stdout_and_the_rates_to_stderr(capsys):
    factory = Factory()

    code = generate("hello", factory=factory)

    out, err = capsys.readouterr()
    assert code == 0
    assert out == "hi é!\n"
    assert err.startswith("[cpu] prefill 5 tokens at ")
    assert "decode 7 tokens at" in err and err.count("\n") == 1
    assert factory.models[0].is_closed


def test_json_is_one_object_and_nothing_else(capsys):
    code = generate("--json", "hello")

    out, err = capsys.readouterr()
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer["text"] == "hi é!"
    assert answer["token_ids"] == [*"hi é!".encode(), EOS]
    assert (answer["finish_reason"], answer["stop_reason"]) == ("stop", None)
    assert answer["device"] == "cpu"
    assert "outputs" not in answer and "logprobs" not in answer
    assert answer["timings"]["num_prompt_tokens"] == 5
    assert answer["timings"]["prefill_tokens_per_second"] > 0


def test_the_prompt_reaches_the_model_as_its_bytes():
    factory = Factory()

    generate("--raw", "naïve", factory=factory)

    np.testing.assert_array_equal(factory.models[0].batches[0].input_ids, list("naïve".encode()))


def test_the_prompt_can_come_from_standard_input(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"piped")))
    factory = Factory()

    assert generate("-", factory=factory) == 0

    np.testing.assert_array_equal(factory.models[0].batches[0].input_ids, list(b"piped"))


def test_max_tokens_cuts_the_answer(capsys):
    generate("--json", "--max-tokens", "2", "hello")

    answer = json.loads(capsys.readouterr().out)
    assert answer["text"] == "hi"
    assert answer["finish_reason"] == "length"


def test_options_reach_the_engine():
    factory = Factory()

    generate("--threads", "3", "--device", "cpu", "--max-tokens", "200", "x", factory=factory)

    assert (factory.rooms[0].num_threads, factory.rooms[0].device) == (3, "cpu")
    assert factory.rooms[0].max_seq_len == 201


def sampled(*arguments: str) -> np.void:
    """The sampling of the first step's only row."""
    factory = Factory()
    assert generate("--json", *arguments, "hello", factory=factory) == 0
    return factory.models[0].samplings[0]


@pytest.mark.parametrize(
    ("option", "value", "field", "expected"),
    [
        ("--temperature", "0.5", "temperature", np.float32(0.5)),
        ("--top-k", "7", "top_k", 7),
        ("--top-p", "0.25", "top_p", np.float32(0.25)),
        ("--min-p", "0.125", "min_p", np.float32(0.125)),
        ("--repetition-penalty", "1.5", "repetition_penalty", np.float32(1.5)),
        ("--presence-penalty", "0.5", "presence_penalty", np.float32(0.5)),
        ("--frequency-penalty", "-0.5", "frequency_penalty", np.float32(-0.5)),
        ("--seed", "9", "seed", 9),
        ("--logprobs", "3", "num_logprobs", 3),
    ],
)
def test_an_option_of_sampling_reaches_the_model(option, value, field, expected):
    # a drawn row in any case, so that there is one to look at
    assert sampled("--temperature", "1", option, value).rows[0][field] == expected


def test_biases_and_bans_reach_the_model():
    found = sampled("--logit-bias", "5:2", "--logit-bias", "7:-3", "--min-tokens", "2")

    first, count = found.rows[0][["first_edit", "num_edits"]]
    edits = found.edits[first : first + count]
    assert {(int(e["token_id"]), float(e["bias"])) for e in edits} == {(5, 2), (7, -3), (EOS, 0)}


def test_greedy_is_the_default_and_tells_no_seed(capsys):
    assert sampled() is None
    generate("hello")
    assert "seed" not in capsys.readouterr().err


def test_a_seed_that_was_chosen_is_told(capsys):
    generate("--temperature", "1", "hello")

    assert "tokens/s, seed " in capsys.readouterr().err


def test_a_stop_string_ends_the_answer_and_is_never_shown(capsys):
    assert generate("--stop", "zz", "--stop", " é", "hello") == 0
    assert capsys.readouterr().out == "hi\n"


def test_a_stop_token_ends_the_answer(capsys):
    generate("--json", "--stop-token-ids", str(ord("i")), "hello")

    answer = json.loads(capsys.readouterr().out)
    assert (answer["text"], answer["stop_reason"]) == ("h", ord("i"))


def test_end_tokens_can_be_ignored(capsys):
    generate("--json", "--ignore-eos", "--max-tokens", "7", "hello")

    assert json.loads(capsys.readouterr().out)["finish_reason"] == "length"


def test_several_answers_are_shown_one_after_another_and_are_a_list_in_json(capsys):
    arguments = ["--n", "2", "--temperature", "1", "--max-tokens", "2", "hello"]
    factory = Factory()

    generate(*arguments, factory=factory)
    shown = capsys.readouterr().out
    generate("--json", *arguments)
    found = json.loads(capsys.readouterr().out)

    assert shown == "[0] hi\n[1]  \xc3\n".replace("\xc3", "\ufffd")
    assert [answer["text"] for answer in found["outputs"]] == ["hi", " \ufffd"]
    assert (factory.rooms[0].max_num_seqs, factory.rooms[0].num_blocks) == (2, 2)


def test_logprobs_are_shown_by_json_only(capsys):
    generate("--json", "--logprobs", "0", "--max-tokens", "1", "hello")
    (scores,) = json.loads(capsys.readouterr().out)["logprobs"]
    assert scores[str(ord("h"))]["rank"] == -1  # what the model of this test says

    with pytest.raises(SystemExit) as leaving:
        generate("--logprobs", "0", "hello")
    assert leaving.value.code == 2


def test_a_score_that_is_no_number_is_null_in_json(capsys):
    generate("--json", "--logprobs", "0", "--prompt-logprobs", "0", "--max-tokens", "1", "hello")

    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)  # NaN is not JSON
    (answered,), prompt = found["logprobs"], found["prompt_logprobs"]
    assert [score["logprob"] for score in answered.values()] == [None]
    assert [score["logprob"] for score in prompt[1].values()] == [None]
    assert found["cumulative_logprob"] is None


def test_auto_takes_cuda_where_there_is_one():
    factory = Factory(unavailable=())

    generate("x", factory=factory)

    assert [room.device for room in factory.rooms] == ["cuda"]


def test_cuda_that_was_asked_for_and_is_not_there_is_an_error(capsys):
    assert generate("--device", "cuda", "x") == 1
    assert capsys.readouterr().err == "error: device cuda: not here\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([""], "prompt must have at least 1 character, got 0"),
        (["x" * 16384], "prompt must have at most 16383 tokens"),
        (["--max-tokens", "16384", "x"], "max_tokens must be from 1 to 16383"),
        (["--temperature", "nan", "x"], "temperature must be 0 or from 1e-05 to 100.0, got nan"),
        (["--top-p", "2", "x"], "top_p must be from 1e-06 to 1.0, got 2"),
        (["--n", "2", "x"], "n must be 1 when temperature is 0"),
        (["--n", "0", "x"], "n must be from 1 to 128, got 0"),
        (["--seed", "-1", "x"], "seed must be from 0"),
        (["--stop", "", "x"], "stop must hold strings of 1 to 256 characters"),
        (["x", "--stop-token-ids", "320"], "stop_token_ids must name ids under vocab_size 320"),
        (["x", "--logit-bias", "1:inf"], "logit_bias of 1 must be from -100.0 to 100.0, got inf"),
        (["--chat", "x"], "no chat_template"),
        (["--model", "no-such-model", "x"], "'no-such-model' is no directory"),
        (["--model", "", "x"], "model must be a name or a path"),
        (["--model", os.devnull, "x"], "a model is a directory, this is a file"),
        (["a\udcff"], "lone surrogate at character 1"),
    ],
)
def test_a_refusal_is_one_line_and_exit_code_1(capsys, arguments, expected):
    code = generate(*arguments)

    out, err = capsys.readouterr()
    assert (code, out) == (1, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert expected in err


@pytest.mark.parametrize(
    "failure", [DeviceFailed("it\n burnt"), OutOfMemory("64 GB asked"), OSError(28, "disk full")]
)
def test_a_failure_while_running_is_one_line_and_closes_the_model(capsys, failure):
    factory = Factory(failure=failure)

    assert generate("x", factory=factory) == 1

    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert factory.models[0].is_closed


def test_an_interrupt_is_no_traceback(capsys):
    assert generate("x", factory=Factory(failure=KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["unknown"],
        ["generate"],
        ["generate", "--max-tokens", "0", "x"],
        ["generate", "--max-tokens", "many", "x"],
        ["generate", "--threads", "-1", "x"],
        ["generate", "--device", "tpu", "x"],
        ["generate", "--chat", "--raw", "x"],
        ["generate", "x", "y"],
        ["generate", "--top-k", "many", "x"],
        ["generate", "x", "--logit-bias", "3"],
    ],
)
def test_wrong_use_is_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as leaving:
        main(arguments, Factory())

    assert leaving.value.code == 2
    said = capsys.readouterr().err
    assert "usage:" in said
    assert "invalid _" not in said  # the name of a function of ours


@pytest.mark.parametrize("words", [[], ["--json"]], ids=["text", "json"])
def test_a_reader_that_goes_away_is_no_traceback(words: list[str]):
    # A process of its own: the case is the interpreter's flush at exit.
    script = (
        "import sys; from engine.__main__ import main; from tests.engine.test_main import Factory\n"
        f"sys.exit(main(['generate', '--model', 'toy', 'x', *{words}], Factory()))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", script],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "PYTHONUNBUFFERED": ""},
        check=False,
    )
    os.close(writer)

    assert result.returncode == 1
    assert result.stderr == ""


def test_help_imports_neither_torch_nor_transformers_nor_the_library():
    script = (
        "import sys\nfrom engine.__main__ import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'cffi', 'engine.bindings'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        cwd=Path(__file__).parents[2],
        capture_output=True,
    )


def test_weights_that_are_not_finite_are_reported_by_name(capsys: pytest.CaptureFixture):
    factory = Factory(not_finite={"model.norm.weight": 3})

    assert generate("--device", "cpu", "hello", factory=factory) == 0

    assert "model.norm.weight has 3 NaN or infinite weights" in capsys.readouterr().err
