from pathlib import Path

import numpy as np
import pytest

from engine.checkpoint import open_checkpoint
from engine.config import ModelConfig
from engine.sources.toy import CONFIGS, byte_tokenizer, resolve_toy
from engine.tokenizer import Tokenizer

# Checkpoint.sha256 of each toy: the same on every machine, or goldens mean nothing elsewhere.
WEIGHTS_SHA256 = {
    "toy": "47934ea594a98f0262b223e32a28914f94a79e6a933cefc9f6b410016cfc4404",
    "toy-untied": "c4b7a31b924a2c5e99e37653a72c23a14216b316aa2f78d685196eb92ae2bd27",
    "toy-mha": "f94ce2139ef28769bc76e9529c3d6739ab7ec03f7ea8095ab540e910bbfcb9cc",
    "toy-gqa3": "6420166b74aeb3b32eae49f741add4970a92d1bf65d52b1000ff2c3d66997a4b",
    "toy-gqa4": "4d73d2a3569e4815c498f49e17f3f0f48d394eb6b4a53b28c51369a84e14130d",
    "toy-gqa8": "41a2290d34e9ce2cc371247743f3f3da634eee2d27176ea023a9ae9c9bd70da2",
    "toy-plain-rope": "2907710466c3c256992323486cd6b95b1a91f85fae13fb1fc3d2c8e4408de37b",
    "toy-wide": "c42f95d46e1438c9bfa5a2a0028b63cccd1e802e6eb631ee88905dfb1c0e4f13",
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_toy_has_the_same_bytes_on_every_machine(cache: Path, name):
    directory = resolve_toy(name, cache)

    with open_checkpoint(directory, CONFIGS[name]) as checkpoint:
        assert checkpoint.sha256() == WEIGHTS_SHA256[name]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_toy_directory_gives_back_its_config(cache: Path, name):
    assert ModelConfig.from_directory(resolve_toy(name, cache)) == CONFIGS[name]


def test_a_toy_is_made_once(cache: Path):
    directory = resolve_toy("toy", cache)
    made = (directory / "model.safetensors").stat().st_mtime_ns

    assert resolve_toy("toy", cache) == directory
    assert (directory / "model.safetensors").stat().st_mtime_ns == made


def test_the_family_has_every_shape_the_engine_must_get_right():
    configs = CONFIGS.values()

    assert {c.num_heads // c.num_kv_heads for c in configs} >= {1, 2, 3, 4, 8}
    assert {c.tie_word_embeddings for c in configs} == {True, False}
    assert {c.rope_scaling is None for c in configs} == {True, False}
    assert any(c.num_heads * c.head_dim != c.hidden_size for c in configs)
    assert any(c.vocab_size % 2 for c in configs)
    wide = CONFIGS["toy-wide"]
    reductions = (wide.hidden_size, wide.num_heads * wide.head_dim, wide.intermediate_size)
    assert all(size > 512 and size % 512 for size in reductions)


def test_rotary_scaling_of_the_toy_has_wavelengths_in_all_three_bands():
    config = CONFIGS["toy"]
    scaling = config.rope_scaling
    assert scaling is not None
    pairs = np.arange(config.head_dim // 2)
    wavelengths = 2 * np.pi * config.rope_theta ** (2 * pairs / config.head_dim)

    original = scaling.original_max_position_embeddings
    long = wavelengths > original / scaling.low_freq_factor
    short = wavelengths < original / scaling.high_freq_factor
    assert long.sum() > 2 and short.sum() > 2 and (~long & ~short).sum() > 2


@pytest.mark.parametrize("name", CONFIGS)
def test_every_id_of_a_toy_is_a_token(cache: Path, name):
    tokenizer = byte_tokenizer(CONFIGS[name].vocab_size)

    assert tokenizer.get_vocab_size() == CONFIGS[name].vocab_size
    assert Tokenizer.from_directory(resolve_toy(name, cache)).encode("é<|end_of_text|>") == [
        0xC3,
        0xA9,
        257,
    ]


def test_transformers_loads_a_toy_as_it_is(cache: Path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = resolve_toy("toy", cache)
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)

    weights = model.state_dict()
    assert model.dtype == torch.bfloat16
    with open_checkpoint(directory, CONFIGS["toy"]) as checkpoint:
        for name in checkpoint.names():
            theirs = weights[name].view(torch.uint16).numpy()
            np.testing.assert_array_equal(checkpoint.tensor(name), theirs)
    text = "naïve 日本"
    assert tokenizer(text)["input_ids"] == Tokenizer.from_directory(directory).encode(text)
