import json
import re

import pytest
import torch

from engine.bindings import Library
from engine.config import ModelConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from verification import goldens, record
from verification.capture import capture_bit_hashes, engine_config_for
from verification.oracle import Reference
from verification.prompts import default_selection, prompts_for
from verification.provenance import weights_sha256
from verification.taps import all_keys, operation_of

TOYS = [name for name in record.IN_GIT if name.startswith("toy")]
ALL = [*TOYS, pytest.param("smollm2-135m", marks=pytest.mark.weights)]


def recorded(name: str) -> goldens.Golden:
    return goldens.load(goldens.GOLDEN_ROOT / name)


def prompts_of(name: str) -> tuple:
    directory = resolve(name)
    config = ModelConfig.from_directory(directory)
    return prompts_for(name, directory, config.vocab_size, default_selection(name))


@pytest.mark.parametrize("name", record.IN_GIT)
def test_every_file_is_the_one_in_its_manifest(name: str):
    assert recorded(name).manifest["model"] == name


@pytest.mark.parametrize("name", record.IN_GIT)
def test_the_record_is_of_the_numerics_version_that_is_built(name: str):
    assert recorded(name).manifest["numerics_version"] == Library().numerics_version


@pytest.mark.parametrize("name", record.IN_GIT)
def test_the_record_says_where_it_comes_from(name: str):
    manifest = recorded(name).manifest

    assert re.fullmatch("[0-9a-f]{40}", manifest["git_commit"])
    for fact in ("weights_sha256", "tokenizer_sha256", "prompts_sha256", "source_stamp"):
        assert re.fullmatch("[0-9a-f]{64}", manifest[fact]), fact
    for fact in ("torch", "transformers", "python", "recorded"):
        assert manifest[fact], fact


@pytest.mark.parametrize("name", ALL)
def test_weights_and_prompts_are_those_that_were_recorded(name: str):
    golden = recorded(name)

    assert (
        weights_sha256(resolve(name), ModelConfig.from_directory(resolve(name)))
        == golden.manifest["weights_sha256"]
    )
    assert {p.id: p.sha256 for p in prompts_of(name)} == {
        prompt_id: prompt.prompt_sha256 for prompt_id, prompt in golden.prompts.items()
    }


@pytest.mark.parametrize("name", record.IN_GIT)
def test_every_tap_of_every_layer_has_a_fingerprint_and_a_hash_of_its_own(name: str):
    golden = recorded(name)
    keys = [tuple(tap) for tap in golden.manifest["taps"]]

    assert keys == list(all_keys(1 + max(layer for _, layer in keys)))
    for prompt_id, prompt in golden.prompts.items():
        assert list(prompt.bits) == keys
        # One token alone: nothing is rotated, so q_rope is q, and attention gives back v.
        assert prompt_id == "len-1" or len(set(prompt.bits.values())) == len(keys)
        assert all(fingerprint.rms > 0 for fingerprint in prompt.fingerprints.values())


@pytest.mark.parametrize("name", record.IN_GIT)
def test_the_yardstick_errs_like_bfloat16_and_no_worse(name: str):
    for prompt in recorded(name).prompts.values():
        errors = {key: e for key, e in prompt.yardstick_error.items() if key[0] != "embed"}

        assert prompt.yardstick_error[("embed", 0)] == 0
        assert min(errors.values()) > 2**-11
        assert max(errors.values()) < 0.5


def test_the_records_stay_small_enough_for_git():
    files = [path for name in record.IN_GIT for path in (goldens.GOLDEN_ROOT / name).iterdir()]

    assert sum(path.stat().st_size for path in files) <= record.MAX_BYTES_IN_GIT


def test_no_manifest_names_a_path_of_a_machine():
    for name in record.IN_GIT:
        text = json.dumps(dict(recorded(name).manifest))

        assert not re.search(r"/(home|root|tmp|work|Users)\b", text)


@pytest.mark.parametrize("name", TOYS)
def test_engine_and_oracle_still_give_what_was_recorded(name: str):
    directory, prompts = resolve(name), prompts_of(name)
    check = goldens.GoldenCheck(recorded(name))
    with ModelRunner(directory, engine_config_for(prompts, "cpu")) as runner:
        hashes = capture_bit_hashes(runner, prompts)
    oracle = Reference(directory, torch.float32)

    for prompt in prompts:
        assert check.same_prompt(prompt.id, prompt.sha256)
        trace = oracle.run(prompt.token_ids, [len(prompt.token_ids) - 1])
        for (tap, layer), values in trace.items():
            check.add_fingerprint(prompt.id, tap, layer, goldens.fingerprint(values.numpy()))
            check.add_engine_hash(prompt.id, tap, layer, hashes[prompt.id][(tap, layer)])

    verdict = check.verdict(lambda tap: operation_of(tap).name)
    assert verdict.status == "pass", (verdict.reason, verdict.details)


def test_a_yardstick_in_place_of_the_oracle_is_noticed():
    name = TOYS[0]
    prompt = prompts_of(name)[0]
    check = goldens.GoldenCheck(recorded(name))

    trace = Reference(resolve(name), torch.bfloat16).run(prompt.token_ids, [0])
    for (tap, layer), values in trace.items():
        found = goldens.fingerprint(values.float().numpy())
        check.add_fingerprint(prompt.id, tap, layer, found)

    assert check.verdict().status == "fail"
    assert len(check.oracle_failures) == check.num_oracle - 1  # embed is a copy in any precision
