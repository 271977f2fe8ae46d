import argparse
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

import verification.__main__ as command_line
from engine.errors import DeviceUnavailable
from engine.sources.toy import CONFIGS
from tests.verification import samples
from verification import verify_model
from verification.__main__ import build_parser, parse_layers
from verification.golden_check import GoldenRun
from verification.goldens import GoldenVerdict

ROOT = Path(command_line.__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0", (0,)), ("0,3-5", (0, 3, 4, 5)), ("5-5", (5,)), (" 4 , 2-3,3 ", (2, 3, 4))],
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "-1", "1-", "1--2", "5-3", "1.5", "²", "0-9999999999"])
def test_what_is_no_layer_is_refused(text: str):
    with pytest.raises(argparse.ArgumentTypeError):
        parse_layers(text)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--device", "tpu"], ("--device", "cpu", "cuda")),
        (["--taps", "q,nonsense"], ("--taps", "'nonsense'", "attn_norm", "logits")),
        (["--op", "conv"], ("--op", "'conv'", "rms_norm", "attention")),
        (["--grade", "good"], ("--grade", "'good'", "exact", "bounded")),
        (["--layers", "5-3"], ("--layers", "5-3")),
        (["--model", "nonsense"], ("--model", "'nonsense'", "smollm2-135m", "toy")),
        (["--colour"], ("--colour",)),
        (["--html", "no/such/place.html"], ("--html", "no/such/place.html")),
        (["--json", "."], ("--json", "'.'")),
    ],
)
def test_a_wrong_word_exits_2_naming_option_and_legal_values(words, named, capsys):
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(words)

    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in named)


class Verified:
    """Stands for harness.verify: remembers what it was asked, gives made-up results."""

    def __init__(self, results: dict):
        self.results = results
        self.asked: dict = {}

    def __call__(self, directory, prompts, options, progress, *, name, decode_text, goldens):
        self.asked = {"prompts": [p for p, _ in prompts], "options": options, "name": name}
        self.asked["goldens"] = goldens
        progress(1, 1, "done")
        return self

    def to_json(self) -> dict:
        return self.results


@pytest.fixture
def command(tmp_path: Path, monkeypatch):
    def call(results: dict, *words: str, gpu: GoldenVerdict | None = None):
        verified, out = Verified(results), io.StringIO()
        monkeypatch.setattr(verify_model, "verify", verified)
        recorded = gpu or GoldenVerdict("pass", None, ("h200, source equal, 9 taps equal",))
        monkeypatch.setattr(verify_model, "check_gpu_record", lambda *_: recorded)
        files = ["--html", str(tmp_path / "v.html"), "--json", str(tmp_path / "v.json")]
        status = command_line.main(["--model", "toy", *files, *words], Console(file=out, width=100))
        return status, out.getvalue(), verified.asked

    return call


def test_a_passing_run_exits_0_and_leaves_both_files(command, tmp_path: Path):
    status, text, _ = command(samples.passing_run())

    assert status == 0
    assert "PASS" in text
    assert json.loads((tmp_path / "v.json").read_text())["verdict"] == "pass"
    assert (tmp_path / "v.html").read_text().startswith("<!DOCTYPE html>")


def test_a_failed_verdict_exits_1_and_leaves_both_files(command, tmp_path: Path):
    status, text, _ = command(samples.failing_run())

    assert status == 1
    assert "first failure" in text
    assert json.loads((tmp_path / "v.json").read_text())["verdict"] == "fail"
    assert "First failure" in (tmp_path / "v.html").read_text()


def test_a_run_in_which_nothing_ran_does_not_exit_0(command):
    assert command(samples.not_run())[0] == 1


def test_a_whole_run_is_held_against_the_record(command):
    _, _, asked = command(samples.passing_run())

    assert isinstance(asked["goldens"], GoldenRun)


def test_a_gpu_record_that_disagrees_fails_a_run_that_passes_otherwise(command, tmp_path: Path):
    differs = GoldenVerdict("fail", "h200: bits differ first at prompt a, q, layer 0")

    status, text, _ = command(samples.passing_run(), gpu=differs)

    assert status == 1
    assert "bits differ first at prompt a" in text
    assert json.loads((tmp_path / "v.json").read_text())["gpu_record"]["status"] == "fail"
    assert "Failed: GPU record" in (tmp_path / "v.html").read_text()


def test_a_gpu_record_of_another_source_is_not_run_in_both_reports(command, tmp_path: Path):
    status, text, _ = command(
        samples.passing_run(), gpu=GoldenVerdict("not run", "not run for this source (record …)")
    )

    assert status == 0
    line = next(line for line in text.splitlines() if line.startswith("GPU record"))
    assert "not run for this source" in line and line.endswith("not run")
    assert "not run for this source" in (tmp_path / "v.html").read_text()


def test_a_selection_reaches_the_harness_and_leaves_the_goldens_out(command):
    words = ("--taps", "q,k", "--layers", "0-1", "--op", "linear", "--grade", "bounded")

    _, _, asked = command(samples.passing_run(), *words, "--prompts", "len-17,len-1")

    selection = asked["options"].selection
    assert asked["prompts"] == ["len-1", "len-17"]
    assert asked["name"] == "toy"
    assert selection.taps == {"q", "k"}
    assert selection.layers == {0, 1}
    assert selection.operations == {"linear"}
    assert selection.grades == {"bounded"}
    assert asked["goldens"] is None


def test_toys_run_the_short_set_unless_told_otherwise(command):
    _, _, few = command(samples.passing_run())
    _, _, many = command(samples.passing_run(), "--prompts", "all")

    assert "long-1100" in few["prompts"]
    assert set(few["prompts"]) < set(many["prompts"])


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--prompts", "nonsense"], ("--prompts", "'nonsense'", "quick", "len-17")),
        (["--layers", "0,2"], ("--layers", "no layer 2", "0 to 1")),
        (["--layers", "1", "--taps", "argmax"], ("--taps", "--layers", "nothing")),
    ],
)
def test_what_only_the_model_can_refuse_exits_2_too(command, words, named, capsys):
    with pytest.raises(SystemExit) as caught:
        command(samples.passing_run(), *words)

    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in named)


@pytest.mark.parametrize(
    "words",
    [
        ["--nonsense"],
        ["--device", "tpu"],
        ["--model", "toy", "--prompts", "nonsense"],
        ["--model", "toy", "--layers", "99"],
    ],
    ids=" ".join,
)
def test_a_wrong_word_is_refused_before_torch_is_loaded(words: list[str]):
    program = (
        "import sys; from verification.__main__ import main\n"
        f"try: main({words})\n"
        "except SystemExit as refused: print(refused.code, 'torch' in sys.modules)"
    )

    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)

    assert said.stdout.splitlines()[-1] == "2 False", said.stdout + said.stderr


def test_an_error_of_the_engine_is_one_line_and_exits_1(command, monkeypatch):
    def refuse(*_, **__):
        raise DeviceUnavailable("no CUDA device\x1b[2J")

    out = io.StringIO()
    monkeypatch.setattr(verify_model, "verify", refuse)

    status = command_line.main(["--model", "toy", "--device", "cuda"], Console(file=out))

    assert status == 1
    assert out.getvalue().splitlines()[-1] == "error: no CUDA device�[2J"


def test_a_report_that_cannot_be_written_is_named_after_the_table_and_exits_1(
    command, tmp_path: Path
):
    (tmp_path / "v.html.new").mkdir()  # where it would be written first

    status, text, _ = command(samples.passing_run())

    assert status == 1
    assert "PASS" in text
    assert re.search(r"^error: .*v.html was not written: ", text.splitlines()[-1])
    assert (tmp_path / "v.json").exists()


def test_reports_are_there_for_whoever_leaves_in_the_middle_of_the_table(
    command, tmp_path: Path, monkeypatch, capsys
):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    def stopped(*_: object) -> None:
        monkeypatch.setattr(Console, "print", full)
        full()

    monkeypatch.setattr(command_line, "print_report", stopped)

    status, _, _ = command(samples.passing_run())

    assert status == 1
    assert "No space left on device" in capsys.readouterr().err
    assert (tmp_path / "v.json").exists() and (tmp_path / "v.html").exists()


def test_a_set_of_prompts_is_run_without_those_too_long_for_the_model(command, monkeypatch):
    short = replace(CONFIGS["toy"], max_position_embeddings=512)
    monkeypatch.setattr(verify_model.ModelConfig, "from_directory", lambda _: short)

    _, text, asked = command(samples.passing_run())

    assert asked["prompts"] and "long-1100" not in asked["prompts"]
    assert "longer than the 496 tokens that the model takes: prompt long-1100" in text


def test_a_prompt_named_by_its_id_is_never_left_out(command, monkeypatch):
    short = replace(CONFIGS["toy"], max_position_embeddings=512)
    monkeypatch.setattr(verify_model.ModelConfig, "from_directory", lambda _: short)

    _, _, asked = command(samples.passing_run(), "--prompts", "long-1100")

    assert asked["prompts"] == ["long-1100"]  # plan_groups refuses it, by name


def test_an_interrupted_run_says_so_in_one_line_and_exits_130(command, monkeypatch, tmp_path: Path):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    out = io.StringIO()
    monkeypatch.setattr(verify_model, "verify", stopped)
    files = ["--html", str(tmp_path / "v.html"), "--json", str(tmp_path / "v.json")]

    status = command_line.main(["--model", "toy", *files], Console(file=out))

    assert status == 130
    assert out.getvalue().splitlines()[-1] == "interrupted: no verdict"
    assert not list(tmp_path.iterdir())


def test_the_results_keep_the_model_as_it_was_asked_for(command, tmp_path: Path):
    command(samples.failing_run())

    assert json.loads((tmp_path / "v.json").read_text())["model"]["asked_as"] == "toy"


def test_the_whole_command_verifies_a_toy(tmp_path: Path):
    files = ["--html", str(tmp_path / "v.html"), "--json", str(tmp_path / "v.json")]
    words = ["--model", "toy-gqa8", "--prompts", "len-17", "--layers", "1", *files]

    status = command_line.main(words, Console(file=io.StringIO()))

    results = json.loads((tmp_path / "v.json").read_text())
    assert status == 0, results["first_failure"]
    layer = results["cells"]["columns"].index("layer")
    assert {row[layer] for row in results["cells"]["rows"]} == {1}
    assert results["goldens"]["status"] == "not run"
