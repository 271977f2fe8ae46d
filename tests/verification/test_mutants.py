import io
import shutil
from dataclasses import replace

import pytest
from rich.console import Console

from verification.mutants.__main__ import main
from verification.mutants.build import ROOT
from verification.mutants.catalogue import (
    CatalogueError,
    Mutant,
    check_all_apply,
    choose,
    load_catalogue,
)
from verification.mutants.judge import Named
from verification.mutants.trial import Outcome, Trial, run
from verification.taps import OPERATIONS

# One fault at least of every operation, and those that only the probes or only the bits can show.
SUBSET = (
    "rope-scaling-missing",
    "rope-smooth-swapped",
    "rope-adjacent-pairs",
    "rope-position-plus-one",
    "norm-eps-zero-in-layer-1",
    "norm-not-rounded-before-weight",
    "norm-mean-over-n-minus-one",
    "linear-output-truncated",
    "linear-steps-descending",
    "linear-logits-in-bf16",
    "embedding-next-row",
    "kv-layers-share-memory",
    "attn-group-mapping",
    "attn-newest-tile-skipped",
    "attn-not-rescaled",
    "attn-scale-5-percent-off",
    "silu-not-rounded",
    "residual-truncated",
    "argmax-last-of-a-tie",
)

NO_OP = """
[[mutant]]
id = "no-op"
file = "twin/residual_add.c"
fault = "none: the two terms of a sum change places"
before = 'bf16_to_float(x[i]) + bf16_to_float(y[i])'
after = 'bf16_to_float(y[i]) + bf16_to_float(x[i])'
operator = "residual_add"
tap = "attn_residual"
prompts = "len-2"
"""
MISNAMED = """
[[mutant]]
id = "misnamed"
file = "twin/silu_and_mul.c"
fault = "the sigmoid of 1.702 x"
before = 'contract_exp2(-g * log2_e)'
after = 'contract_exp2(-1.702f * g * log2_e)'
operator = "rms_norm"
tap = "attn_norm"
prompts = "len-2"
"""
FAULT = Mutant(
    id="fault",
    file="twin/argmax.c",
    fault="a fault",
    before="a",
    after="b",
    operator="linear",
    tap="q",
)


def outcome(mutant: Mutant = FAULT, verified: Named | None = None, bits: Named | None = None):
    return Outcome(mutant, verified, True, bits, 0.0)


def named(operator: str = "linear", tap: str = "q", layer: int = 0) -> Named:
    return Named(operator, tap, layer, "bounded", "too far")


def command(tmp_path, text: str, *arguments: str) -> tuple[int, str]:
    path = tmp_path / "catalogue.toml"
    path.write_text(text, encoding="utf-8")
    out = io.StringIO()
    status = main(["--catalogue", str(path), *arguments], Console(file=out, width=200))
    return status, out.getvalue()


def test_every_fault_of_the_catalogue_applies_to_the_sources_as_they_are():
    check_all_apply(load_catalogue(), ROOT / "csrc")


def test_every_operation_has_a_fault_planted_in_it():
    assert {mutant.operator for mutant in load_catalogue()} == set(OPERATIONS)


def test_the_suite_finds_and_names_faults_of_every_operation():
    mutants = choose(load_catalogue(), ",".join(SUBSET))

    trial = run(mutants)

    assert {mutant.operator for mutant in mutants} == set(OPERATIONS)
    assert [o.mutant.id for o in trial.outcomes if not o.is_named] == []
    assert trial.num_false_alarms == 0
    assert trial.passed


# The runner itself must be able to fail.


def test_a_fault_whose_text_is_gone_fails_the_run_by_name(tmp_path):
    stale = NO_OP.replace("bf16_to_float(x[i]) +", "bf16_to_double(x[i]) +")

    status, text = command(tmp_path, stale)

    assert status == 1
    assert "no-op" in text and "occurs 0 times in csrc/twin/residual_add.c" in text


def test_a_fault_whose_text_occurs_twice_fails_the_run(tmp_path):
    status, text = command(
        tmp_path, NO_OP.replace("'bf16_to_float(x[i]) + bf16_to_float(y[i])'", "'bf16'")
    )

    assert status == 1
    assert "must be once" in text


def test_a_change_that_does_nothing_survives_and_a_wrong_name_is_noticed(tmp_path):
    status, text = command(tmp_path, NO_OP + MISNAMED)

    assert status == 1
    assert "survivor: no-op on toy, len-2; no bit differs" in text
    assert "misnamed: misnamed: expected rms_norm (attn_norm, layer 0), got silu_and_mul" in text
    assert "found 1 of 2, named 0 of 2" in text


def test_a_fault_that_does_not_compile_fails_the_run(tmp_path):
    broken = MISNAMED.replace("contract_exp2(-1.702f * g * log2_e)", "no_such_function(g)")

    status, text = command(tmp_path, broken)

    assert status == 1
    assert "mutant misnamed does not build" in text


def test_a_suite_that_fails_the_unmutated_twin_fails_the_run(tmp_path):
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    (root / "engine").mkdir()
    shutil.copy2(ROOT / "engine" / "source_stamp.py", root / "engine")
    shutil.copy2(ROOT / "Makefile", root)
    (sine,) = choose(load_catalogue(), "rope-sine-sign")
    path = root / "csrc" / sine.file
    path.write_text(sine.apply(path.read_text(encoding="utf-8")), encoding="utf-8")
    (other,) = choose(load_catalogue(), "rope-table-sine-negated")

    trial = run([replace(other, prompts="len-2")], root=root)

    assert trial.num_found == 1
    assert trial.num_false_alarms == 1
    assert not trial.passed


def test_an_unknown_id_is_refused_by_name(tmp_path):
    status, text = command(tmp_path, NO_OP, "--only", "no-such-fault")

    assert status == 1
    assert "no mutant 'no-such-fault'" in text


# What an outcome is worth.


def test_a_fault_is_found_by_any_failure_and_named_only_at_its_place():
    assert not outcome().is_found
    assert outcome(verified=named()).is_named
    for wrong in (named("rms_norm", "attn_norm"), named(tap="k"), named(layer=1)):
        assert outcome(verified=wrong).is_found
        assert not outcome(verified=wrong).is_named


def test_other_bits_do_not_stand_for_a_failure_against_transformers():
    assert not outcome(bits=named()).is_found


def test_a_legal_variant_is_found_by_its_bits_and_must_pass_the_rest():
    legal = replace(FAULT, found_by="bits", is_legal=True)

    good, bad = outcome(legal, bits=named(tap="k")), outcome(legal, verified=named(), bits=named())

    assert good.is_found and good.is_named and not good.is_false_alarm
    assert bad.is_false_alarm
    assert Trial({}, (good,)).passed
    assert not Trial({}, (good, bad)).passed


# The catalogue refuses what could never be found.


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"after": "a"}, "the same text"),
        ({"operator": "conv"}, "no operator 'conv'"),
        ({"tap": "o", "operator": "rms_norm"}, "computed by linear, not by rms_norm"),
        ({"found_by": "luck"}, "found_by is 'luck'"),
        ({"is_legal": True}, "cannot be legal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_fault_that_means_nothing_is_refused(change, words):
    with pytest.raises(CatalogueError, match=words):
        replace(FAULT, **change)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no mutants"),
        (NO_OP + NO_OP, "used twice"),
        (NO_OP + "colour = 1\n", "unknown field 'colour'"),
        (NO_OP.replace('tap = "attn_residual"\n', ""), "missing"),
    ],
    ids=["empty", "twice", "unknown", "missing"],
)
def test_a_malformed_catalogue_is_refused(tmp_path, text, words):
    path = tmp_path / "catalogue.toml"
    path.write_text(text, encoding="utf-8")

    with pytest.raises(CatalogueError, match=words):
        load_catalogue(path)
