from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import ModelConfig
from engine.models import resolve
from verification import golden_check, record
from verification.golden_check import check_goldens
from verification.golden_measure import measure
from verification.prompts import Prompt
from verification.provenance import weights_sha256

PROMPTS = [Prompt("a", "for this test", (7, 8, 9)), Prompt("b", "for this test", tuple(range(40)))]


def silent(*_: object) -> None:
    """Takes progress and says nothing."""


@pytest.fixture(scope="module")
def toy() -> Path:
    return resolve("toy")


@pytest.fixture(scope="module")
def weights(toy: Path) -> str:
    return weights_sha256(toy, ModelConfig.from_directory(toy))


@pytest.fixture(scope="module")
def measured(toy: Path) -> tuple:
    return measure(toy, PROMPTS, silent)


@pytest.fixture
def root(tmp_path: Path, measured: tuple) -> Path:
    facts, prompts = measured
    record.write(tmp_path / "toy", {"model": "toy", **facts}, prompts)
    return tmp_path


def test_a_model_agrees_with_its_own_record(root: Path, toy: Path, weights: str):
    verdict = check_goldens("toy", toy, PROMPTS, weights, roots=[root])

    assert verdict.status == "pass"
    assert verdict.details[0].startswith("engine: 66 taps, bits equal")
    assert verdict.details[1].startswith("oracle: 66 taps within ")


def test_without_a_record_it_is_not_run_and_says_so(tmp_path: Path, toy: Path, weights: str):
    verdict = check_goldens("toy", toy, PROMPTS, weights, roots=[tmp_path])

    assert (verdict.status, verdict.reason) == ("not run", "no goldens are recorded for toy")


def test_a_damaged_record_fails_by_name(root: Path, toy: Path, weights: str):
    (root / "toy" / "tokens.json").write_text("{}")

    verdict = check_goldens("toy", toy, PROMPTS, weights, roots=[root])

    assert verdict.status == "fail"
    assert "tokens.json is not the file that was recorded" in verdict.reason


def test_other_weights_fail_before_anything_is_compared(root: Path, toy: Path):
    verdict = check_goldens("toy", toy, PROMPTS, "f" * 64, roots=[root])

    assert verdict.status == "fail"
    assert "weights_sha256 is ffffffffffff, recorded was" in verdict.reason
    assert verdict.details == ()


def test_an_engine_that_changed_fails_by_tap_layer_operator_and_prompt(
    root: Path, toy: Path, weights: str, measured: tuple
):
    facts, prompts = measured
    bits = {**prompts["b"].bits, ("act", 1): "0" * 64, ("down", 1): "0" * 64}
    changed = {**prompts, "b": replace(prompts["b"], bits=bits)}
    record.write(root / "toy", {"model": "toy", **facts}, changed)

    verdict = check_goldens("toy", toy, PROMPTS, weights, roots=[root])

    assert verdict.status == "fail"
    assert "first at layer 1, act (silu_and_mul), prompt b; 2 of 66 taps" in verdict.reason


def test_a_prompt_that_was_not_recorded_fails(root: Path, toy: Path, weights: str):
    new = Prompt("c", "for this test", (1,))

    verdict = check_goldens("toy", toy, [*PROMPTS, new], weights, roots=[root])

    assert verdict.status == "fail"
    assert "prompt c was never recorded" in verdict.reason


def test_the_record_in_git_comes_before_the_one_in_the_cache():
    first, second = golden_check.golden_roots()

    assert first.name == second.name == "golden"
    assert (first / "prompts.jsonl").exists()


def test_greedy_tokens_come_with_their_lead(measured: tuple):
    _, prompts = measured

    for prompt in prompts.values():
        assert len(prompt.tokens) == len(prompt.gaps) == 16
        assert min(prompt.gaps) >= 0


def test_a_copy_has_no_yardstick_error_and_a_sum_has_bfloat16s(measured: tuple):
    _, prompts = measured

    assert prompts["b"].yardstick_error[("embed", 0)] == 0
    assert 2**-11 < prompts["b"].yardstick_error[("q", 0)] < 2**-6
