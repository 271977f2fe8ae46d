"""Every variant is told when it is what was done, and nothing is told of what is right."""

import pytest
import torch

from verification.diagnosis import caches, rotations
from verification.diagnosis.__main__ import TAPS, Stage, Told, of_catalogue, record_of
from verification.diagnosis.fit import diagnose
from verification.diagnosis.known_faults import FAULTS
from verification.diagnosis.library import VARIANTS
from verification.mutants.catalogue import CATALOGUE_PATH, load_catalogue
from verification.passes import Pass
from verification.replay import rope_table
from verification.taps import POINT


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage()


@pytest.fixture(scope="module")
def right_run(stage) -> Pass:
    return stage.run


def test_every_operation_with_a_tap_has_variants():
    assert set(VARIANTS) == {point.operation for point in POINT.values()} == set(TAPS)


@pytest.mark.parametrize("operation", TAPS)
def test_each_variant_is_named_and_nothing_is_said_of_what_is_none(stage, operation):
    told = list(stage.of_operation(operation))

    assert [each for each in told if not each.is_right] == []
    assert sum(each.wanted is not None for each in told) >= 4
    assert sum(each.wanted is None for each in told) >= 5


def test_the_known_faults_are_the_catalogues_and_a_few_are_told_in_the_real_c():
    ids = {mutant.id for mutant in load_catalogue(CATALOGUE_PATH)}
    told = list(
        of_catalogue(["rope-adjacent-pairs", "norm-weight-missing", "attn-scale-one-over-d"])
    )

    assert set(FAULTS) <= ids
    assert len(told) == 3
    assert [each for each in told if not each.is_right] == []


def test_a_fault_told_by_another_name_and_a_false_diagnosis_fail_the_record():
    right = Told("linear", "truncated", "truncated", "your output equals truncated")
    silent = Told("linear", "nothing", None, None)

    assert record_of([right, silent], [right], 1.0).passed
    for wrong in (
        Told("linear", "truncated", "truncated", "your output equals rounded"),
        Told("linear", "truncated", "truncated", None),
        Told("linear", "nothing", None, "your output equals truncated"),
    ):
        assert not record_of([right, silent, wrong], [right], 1.0).passed


def test_each_wrong_table_is_named_and_the_right_one_is_not(stage):
    config, reference = stage.config, stage.reference
    positions = torch.tensor([*range(300), 4095, 8191, 8192, 32767, 131071])
    cos, sin = reference.rope_table(positions.tolist())
    right = rope_table(cos, sin, positions, reference.inv_freq())

    for guess in rotations.rope_table(config, positions):
        value = guess.result if isinstance(guess.result, torch.Tensor) else guess.result.value
        told = diagnose(rotations.rope_table(config, positions), value, right)
        assert told is not None and guess.words in told, (guess.words, told)
    assert diagnose(rotations.rope_table(config, positions), right.value, right) is None


def test_each_wrong_cache_is_named_and_the_right_one_is_not(right_run):
    right = torch.cat(right_run.keys(1, 0), 1)

    def told(value: torch.Tensor) -> str | None:
        return diagnose(caches.write_kv_cache(right_run, 1, 0), value, right)

    for guess in caches.write_kv_cache(right_run, 1, 0):
        assert guess.words in (told(guess.result) or ""), guess.words
    assert told(right) is None
    assert told(right.flip(1)) is None


def test_each_wrong_choice_of_the_largest_is_named_and_the_right_one_is_not():
    logits = torch.randn(60, 300, generator=torch.Generator().manual_seed(3))
    logits[::7, 20:23] = 9.0  # ties
    right = logits.argmax(-1)

    for guess in caches.argmax(logits):
        told = diagnose(caches.argmax(logits), guess.result, right)
        if not torch.equal(guess.result, right):
            assert guess.words in (told or ""), guess.words
    assert diagnose(caches.argmax(logits), right, right) is None
