from dataclasses import replace
from pathlib import Path

import pytest

from engine.models import resolve
from verification import golden_check, record
from verification.golden_check import GoldenRun
from verification.golden_measure import measure
from verification.goldens import GoldenVerdict
from verification.harness import verify
from verification.plan import Options
from verification.prompts import Prompt

PROMPTS = [Prompt("a", "for this test", (7, 8, 9)), Prompt("b", "for this test", tuple(range(40)))]


def silent(*_: object) -> None:
    """Takes progress and says nothing."""


@pytest.fixture(scope="module")
def toy() -> Path:
    return resolve("toy")


@pytest.fixture(scope="module")
def measured(toy: Path) -> tuple:
    return measure(toy, PROMPTS, silent)


@pytest.fixture
def root(tmp_path: Path, measured: tuple) -> Path:
    facts, prompts = measured
    record.write(tmp_path / "toy", {"model": "toy", **facts}, prompts)
    return tmp_path


def verdict(toy: Path, root: Path, prompts: list[Prompt] = PROMPTS) -> GoldenVerdict:
    """Of a verification of the toy beside the record under `root`."""
    ids = [(p.id, p.token_ids) for p in prompts]
    goldens = GoldenRun("toy", prompts, [root])
    return verify(toy, ids, Options(continuation_tokens=2), name="toy", goldens=goldens).goldens


def test_a_model_agrees_with_its_own_record(root: Path, toy: Path):
    found = verdict(toy, root)

    assert found.status == "pass"
    assert found.details[0].startswith("engine: 66 taps, bits equal")
    assert found.details[1].startswith("oracle: 66 taps within ")
    assert found.details[2] == "oracle: 4 greedy tokens equal to those recorded"


def test_without_a_record_it_is_not_run_and_says_so(tmp_path: Path):
    found = GoldenRun("toy", PROMPTS, [tmp_path]).verdict()

    assert (found.status, found.reason) == ("not run", "no goldens are recorded for toy")


def test_a_record_that_nothing_was_held_against_is_not_run(root: Path):
    assert GoldenRun("toy", PROMPTS, [root]).verdict().status == "not run"


def test_a_damaged_record_fails_by_name(root: Path):
    (root / "toy" / "tokens.json").write_text("{}")

    found = GoldenRun("toy", PROMPTS, [root]).verdict()

    assert found.status == "fail"
    assert "tokens.json is not the file that was recorded" in found.reason


def test_other_weights_fail_before_anything_is_compared(root: Path):
    run = GoldenRun("toy", PROMPTS, [root])
    run.begin(weights_sha256="f" * 64)
    run.add_text("a", [1, 2, 3])

    assert run.verdict().status == "fail"
    assert "weights_sha256 is ffffffffffff, recorded was" in run.verdict().reason
    assert run.verdict().details == ()


def test_an_engine_that_changed_fails_by_tap_layer_operator_and_prompt(
    root: Path, toy: Path, measured: tuple
):
    facts, prompts = measured
    bits = {**prompts["b"].bits, ("act", 1): "0" * 64, ("down", 1): "0" * 64}
    changed = {**prompts, "b": replace(prompts["b"], bits=bits)}
    record.write(root / "toy", {"model": "toy", **facts}, changed)

    found = verdict(toy, root)

    assert found.status == "fail"
    assert "first at layer 1, act (silu_and_mul), prompt b; 2 of 66 taps" in found.reason


def test_a_failed_record_fails_a_verification_that_passes_otherwise(root: Path, toy: Path):
    (root / "toy" / "tokens.json").write_text("{}")
    goldens = GoldenRun("toy", PROMPTS[:1], [root])

    results = verify(toy, [("a", PROMPTS[0].token_ids)], name="toy", goldens=goldens)

    assert results.first_failure is None
    assert results.verdict == "fail"


def test_a_prompt_that_was_not_recorded_fails(root: Path):
    new = Prompt("c", "for this test", (1,))

    found = GoldenRun("toy", [*PROMPTS, new], [root]).verdict()

    assert found.status == "fail"
    assert "prompt c was never recorded" in found.reason


def test_a_directory_with_the_name_of_our_model_is_not_held_to_our_record():
    assert len(golden_check.golden_roots("toy")) == 2
    (root,) = golden_check.golden_roots("models/toy")

    assert root == golden_check.golden_roots("toy")[1]


def test_the_record_in_git_comes_before_the_one_in_the_cache():
    first, second = golden_check.golden_roots("toy")

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
