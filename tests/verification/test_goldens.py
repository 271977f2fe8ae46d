import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from verification import goldens, record
from verification.goldens import GoldenCheck, GoldenError, GoldenPrompt

TAPS = [("embed", 0), ("q", 0), ("mlp_residual", 0), ("q", 1), ("mlp_residual", 1), ("logits", 0)]
MANIFEST = {"model": "toy", "numerics_version": "n.1", "weights_sha256": "w"}
ROWS, WIDTH = 5, 96


def oracle_values(seed: int = 0) -> dict:
    generator = np.random.default_rng(seed)
    values = {}
    for key in TAPS:
        tap = generator.standard_normal((ROWS, WIDTH)).astype(np.float32)
        tap[:, 7] *= 1000  # a massive channel, as trained models have
        values[key] = tap
    return values


def engine_bits(values: dict) -> dict:
    return {key: (value.view(np.uint32) >> 16).astype(np.uint16) for key, value in values.items()}


def golden_prompt(seed: int = 0) -> GoldenPrompt:
    values = oracle_values(seed)
    return GoldenPrompt(
        prompt_sha256="p",
        tokens=(3, 1),
        gaps=(0.5, 0.01),
        fingerprints={key: goldens.fingerprint(value) for key, value in values.items()},
        yardstick_error=dict.fromkeys(TAPS, 0.002),
        bits={key: goldens.bit_hash(key[0], v) for key, v in engine_bits(values).items()},
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    record.write(tmp_path / "toy", dict(MANIFEST), {"a": golden_prompt(0), "b": golden_prompt(1)})
    return tmp_path / "toy"


def checked(directory: Path, oracle: dict, engine: dict) -> goldens.GoldenVerdict:
    check = GoldenCheck(goldens.load(directory))
    assert check.same_prompt("a", "p")
    for tap, layer in TAPS:
        check.add_fingerprint("a", tap, layer, goldens.fingerprint(oracle[(tap, layer)]))
        check.add_engine_hash("a", tap, layer, goldens.bit_hash(tap, engine[(tap, layer)]))
    return check.verdict(operator_of=lambda tap: f"operator of {tap}")


def test_a_record_is_read_back_as_it_was_written(directory: Path):
    golden = goldens.load(directory)

    written = golden_prompt(1)
    assert golden.prompts["b"].bits == written.bits
    assert golden.prompts["b"].tokens == written.tokens
    assert golden.prompts["b"].gaps == written.gaps
    for key in TAPS:
        assert (
            goldens.distance(golden.prompts["b"].fingerprints[key], written.fingerprints[key])
            < 1e-7
        )
        assert golden.prompts["b"].yardstick_error[key] == pytest.approx(0.002)


def test_the_same_values_pass_and_say_how_many(directory: Path):
    verdict = checked(directory, oracle_values(), engine_bits(oracle_values()))

    assert verdict.status == "pass"
    assert "6 taps, bits equal to those recorded for n.1" in verdict.details[0]


@pytest.mark.parametrize("seed", range(5))
def test_an_oracle_of_another_cpu_passes_and_one_in_bfloat16_fails(directory: Path, seed: int):
    generator = np.random.default_rng(seed)
    engine = engine_bits(oracle_values())

    def perturbed(relative: float) -> dict:
        return {
            key: value * (1 + relative * generator.standard_normal(value.shape))
            for key, value in oracle_values().items()
        }

    assert checked(directory, perturbed(1e-6), engine).status == "pass"
    failed = checked(directory, perturbed(2**-9), engine)
    assert failed.status == "fail"
    assert len(failed.details) == len(TAPS) - 1  # with `reason` every tap is named
    assert "oracle, prompt a, embed, layer 0" in failed.reason


def test_one_wrong_value_of_the_oracle_fails_its_tap_alone(directory: Path):
    oracle = oracle_values()
    oracle[("q", 1)][-1, 3] += 5.0  # in a row whose massive channel is a thousand times larger

    verdict = checked(directory, oracle, engine_bits(oracle_values()))

    assert "prompt a, q, layer 1" in verdict.reason
    assert verdict.details == ()


@settings(max_examples=50)
@given(tap=st.sampled_from(TAPS[:-1]), row=st.integers(0, ROWS - 1), bit=st.integers(0, 15))
def test_one_flipped_bit_of_the_engine_fails(tap, row: int, bit: int, tmp_path_factory):
    directory = tmp_path_factory.mktemp("golden") / "toy"
    record.write(directory, dict(MANIFEST), {"a": golden_prompt(0)})
    engine = engine_bits(oracle_values())
    engine[tap][row, 11] ^= np.uint16(1 << bit)

    verdict = checked(directory, oracle_values(), engine)

    assert verdict.status == "fail"
    assert f"layer {tap[1]}, {tap[0]} (operator of {tap[0]}), prompt a" in verdict.reason


def test_the_first_differing_tap_is_the_first_of_the_forward_pass_not_of_the_calls(directory: Path):
    check = GoldenCheck(goldens.load(directory))
    for tap, layer in (("q", 1), ("embed", 0), ("q", 0)):
        check.add_engine_hash(
            "a", tap, layer, "other" if tap == "q" else check.golden.prompts["a"].bits[("embed", 0)]
        )

    assert "first at layer 0, q" in check.verdict().reason
    assert "2 of 3 taps differ" in check.verdict().reason


@pytest.mark.parametrize(
    ("tokens", "status", "equal"),
    [
        ((3, 1), "pass", 2),
        ((3,), "pass", 1),
        ((3, 9), "pass", 1),  # the recorded choice led by less than the tolerance: a tie
        ((9, 1), "fail", 0),  # it led by far more
    ],
)
def test_greedy_texts_part_only_at_a_tie(directory: Path, tokens, status: str, equal: int):
    check = GoldenCheck(goldens.load(directory))
    bits = engine_bits(oracle_values(0))["q", 0]
    check.add_engine_hash("a", "q", 0, goldens.bit_hash("q", bits))
    check.add_tokens("a", tokens)

    assert check.verdict().status == status
    assert check.num_tokens == equal


def test_only_the_last_row_of_the_logits_counts():
    values = np.arange(12, dtype=np.float32).reshape(3, 4)

    assert goldens.bit_hash("logits", values) == goldens.bit_hash("logits", values[2:])
    assert goldens.bit_hash("q", values) != goldens.bit_hash("q", values[2:])


def test_a_check_of_nothing_is_not_run(directory: Path):
    assert GoldenCheck(goldens.load(directory)).verdict().status == "not run"


def test_other_numerics_and_other_weights_fail_by_name(directory: Path):
    check = GoldenCheck(goldens.load(directory))

    assert not check.same_subject(numerics_version="n.2", weights_sha256="w")
    assert check.verdict().status == "fail"
    assert "numerics_version is n.2, recorded was n.1" in check.verdict().reason


@pytest.mark.parametrize(
    ("prompt", "sha", "named"), [("c", "p", "never recorded"), ("a", "x", "other token ids")]
)
def test_a_prompt_that_was_not_recorded_fails_by_name(directory: Path, prompt, sha, named: str):
    check = GoldenCheck(goldens.load(directory))

    assert not check.same_prompt(prompt, sha)
    assert f"prompt {prompt} " in check.verdict().reason
    assert named in check.verdict().reason


@pytest.mark.parametrize("name", goldens.FILES)
def test_a_file_changed_by_one_byte_is_refused_by_name(directory: Path, name: str):
    path = directory / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)

    with pytest.raises(GoldenError, match=f"{name} is not the file that was recorded"):
        goldens.load(directory)


@pytest.mark.parametrize("name", goldens.FILES)
def test_a_missing_file_is_refused_by_name(directory: Path, name: str):
    (directory / name).unlink()

    with pytest.raises(GoldenError, match=f"{name} is missing"):
        goldens.load(directory)


def test_a_manifest_that_forgets_a_file_is_refused(directory: Path):
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["files"]["bits.json"]
    (directory / "manifest.json").write_text(json.dumps(manifest))

    with pytest.raises(GoldenError, match="the manifest lists"):
        goldens.load(directory)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1}'])
def test_what_is_no_manifest_is_refused(directory: Path, text: str):
    (directory / "manifest.json").write_text(text)

    with pytest.raises(GoldenError, match="manifest"):
        goldens.load(directory)


def test_another_schema_is_refused(directory: Path):
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps({**manifest, "schema": 99}))

    with pytest.raises(GoldenError, match="schema 99"):
        goldens.load(directory)


def test_the_signs_of_the_projections_never_change():
    # Recorded fingerprints depend on them: this pins the first of three rows.
    signs = goldens._signs(12)

    assert signs[0].astype(int).tolist() == FIRST_SIGNS
    assert set(np.unique(signs)) == {-1.0, 1.0}


FIRST_SIGNS = [-1, 1, 1, 1, 1, -1, 1, 1, -1, 1, 1, 1]


def test_the_norm_of_a_fingerprint_estimates_the_norm_of_the_row():
    row = np.random.default_rng(3).standard_normal((1, 4096))

    estimate = np.linalg.norm(goldens.fingerprint(row).projections) / goldens.NUM_PROJECTIONS**0.5

    assert estimate == pytest.approx(np.linalg.norm(row), rel=0.3)


def test_a_zero_tap_is_equal_to_itself_and_far_from_anything_else():
    zero = goldens.fingerprint(np.zeros((1, 8)))
    one = goldens.fingerprint(np.ones((1, 8)))

    assert goldens.distance(zero, zero) == 0
    assert goldens.distance(one, zero) == np.inf
