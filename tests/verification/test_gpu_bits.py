import copy
import json
from pathlib import Path

import pytest

from engine.bindings import Library
from engine.models import cache_root, resolve
from engine.sources import shape, smollm2, toy
from verification import goldens
from verification.gpu_bits import (
    LONG_PROMPT,
    LONG_PROMPT_MODEL,
    MODELS,
    NUM_DECODED,
    TRAINED_PROMPT,
    differences,
    is_decoded,
    model_bits,
    num_taps,
    recorded_prompts,
    short,
)
from verification.prompts import Prompt

PROMPTS = (Prompt("one", "for this test", (7,)), Prompt("forty", "for this test", tuple(range(40))))


@pytest.fixture(scope="module")
def bits(library: Library) -> dict:
    return model_bits("toy", resolve("toy"), PROMPTS, "cpu", library)


def test_the_record_is_of_every_toy_of_the_trained_model_and_of_the_real_shape():
    assert set(MODELS) == {*toy.CONFIGS, smollm2.NAME, shape.NAME}


@pytest.mark.parametrize("name", toy.CONFIGS)
def test_one_prompt_that_every_toy_takes_reaches_beyond_8192_tokens(name: str):
    config = toy.CONFIGS[name]

    assert 8192 < len(LONG_PROMPT.token_ids) <= config.max_position_embeddings - 16
    assert len(LONG_PROMPT.token_ids) > 8 * 1024  # more than eight segments of attention
    assert max(LONG_PROMPT.token_ids) < config.vocab_size
    if scaling := config.rope_scaling:  # every band of it
        assert scaling.original_max_position_embeddings * scaling.factor < 8192


def test_the_long_prompt_is_recorded_of_one_toy():
    assert LONG_PROMPT in recorded_prompts(LONG_PROMPT_MODEL, resolve(LONG_PROMPT_MODEL))


def test_the_real_shape_has_prompts_up_to_512_tokens_all_of_them_decoded(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(toy.config_json(shape.CONFIG)))

    prompts = recorded_prompts(shape.NAME, tmp_path)

    assert [len(p.token_ids) for p in prompts] == [1, 17, 129, 512]
    assert all(is_decoded(shape.NAME, p.id) for p in prompts)


@pytest.mark.weights
def test_the_trained_model_has_a_prompt_of_more_than_2048_tokens():
    if not any(cache_root().glob(f"{smollm2.NAME}-*/model.safetensors")):
        pytest.skip("requires smollm2-135m in the model cache: make verify fetches it")

    *_, longest = recorded_prompts(smollm2.NAME, resolve(smollm2.NAME))

    assert longest.id == TRAINED_PROMPT.id and len(longest.token_ids) > 2048
    assert is_decoded(smollm2.NAME, longest.id)


def test_a_prompt_has_every_tap_of_prefill_and_decode_and_what_greedy_steps_leave(bits: dict):
    for phases in bits.values():
        assert list(phases) == ["prefill", "decode", "greedy"]
        assert phases["prefill"].keys() == phases["decode"].keys()
        assert {len(phases["prefill"][tap]) for tap in ("q", "k_rope", "mlp_residual")} == {2}
        assert list(phases["greedy"]) == ["token_ids", "logits", "k_cache", "v_cache"]
    assert num_taps(bits) == 2 * (33 + 33 + 6)


def test_the_prefill_is_that_of_the_goldens():
    golden = goldens.load(goldens.GOLDEN_ROOT / "toy")
    prompts = [p for p in recorded_prompts("toy", resolve("toy")) if p.id == "len-17"]

    found = model_bits("toy", resolve("toy"), prompts, "cpu")["len-17"]["prefill"]

    for (tap, layer), digest in golden.prompts["len-17"].bits.items():
        assert found[tap][layer] == short(digest)


def test_a_prompt_of_one_token_is_decoded_from_nothing_and_gives_the_prefills_bits(bits: dict):
    one = bits["one"]

    assert NUM_DECODED > 1
    assert one["decode"] == one["prefill"]


def test_equal_bits_do_not_differ(bits: dict):
    assert differences(bits, copy.deepcopy(bits)) == []


@pytest.mark.parametrize(
    ("phase", "tap", "layer"), [("prefill", "q", 1), ("decode", "attn", 0), ("greedy", "logits", 0)]
)
def test_one_changed_hash_is_named_by_prompt_phase_tap_and_layer(bits: dict, phase, tap, layer):
    changed = copy.deepcopy(bits)
    changed["forty"][phase][tap][layer] = "0" * 10

    assert differences(changed, bits) == [f"prompt forty, {phase}, {tap}, layer {layer}"]


def test_the_first_difference_is_the_first_in_forward_order(bits: dict):
    changed = copy.deepcopy(bits)
    for tap, layer in (("q", 1), ("down", 0)):
        changed["forty"]["prefill"][tap][layer] = "0" * 10

    assert differences(changed, bits)[0] == "prompt forty, prefill, down, layer 0"


def test_a_missing_prompt_phase_or_tap_is_a_difference(bits: dict):
    fewer = {"one": bits["one"]}
    without_phase = {**bits, "one": {"prefill": bits["one"]["prefill"]}}
    without_tap = copy.deepcopy(bits)
    del without_tap["one"]["decode"]["q"]

    assert differences(fewer, bits) == ["other prompts: ['forty']"]
    assert differences(without_phase, bits) and differences(bits, without_phase)
    assert "prompt one, decode, q, layer 0" in differences(without_tap, bits)


def test_the_number_of_threads_is_free(bits: dict, tmp_path: Path, monkeypatch):
    from dataclasses import replace

    from verification import gpu_bits

    room = gpu_bits.room_for
    monkeypatch.setattr(gpu_bits, "room_for", lambda *words: replace(room(*words), num_threads=1))

    assert differences(model_bits("toy", resolve("toy"), PROMPTS, "cpu"), bits) == []
