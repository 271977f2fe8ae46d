"""The table of cos and sin: the page's bits, and transformers' own rotary module."""

from dataclasses import replace

import numpy as np
import pytest

from engine.config import ModelConfig, RopeScaling
from engine.errors import InvalidArgument
from engine.model_struct import fill_model_config
from engine.ops import Ops
from tests.twin import contract
from tests.twin.bits import assert_same_bits

# 2048 and 8192 are where the bands of Llama 3.2 change; 131071 is its last position.
POSITIONS = (0, 1, 2047, 2048, 8191, 8192, 131071)

LLAMA = ModelConfig(
    vocab_size=320,
    hidden_size=128,
    intermediate_size=320,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=RopeScaling(32.0, 1.0, 4.0, 8192),  # Llama 3.2 1B's
    max_position_embeddings=131072,
    tie_word_embeddings=True,
    bos_token_id=None,
    eos_token_ids=(),
)
CONFIGS = {
    "llama-3.2": LLAMA,
    "llama-3.1": replace(LLAMA, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192)),
    "default": replace(LLAMA, rope_scaling=None),
    "smollm2": replace(LLAMA, rope_scaling=None, rope_theta=100000.0),
    "llama-2": replace(LLAMA, rope_scaling=None, rope_theta=10000.0),
    "toy": replace(LLAMA, rope_theta=10000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)),
    # no published model has a low factor but 1, which multiplies and divides alike
    "low-factor-2": replace(LLAMA, rope_scaling=RopeScaling(8.0, 2.0, 6.0, 4096)),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@configs
def test_the_boundary_positions_have_the_contracts_bits(twin: Ops, config: ModelConfig):
    table = twin.rope_table(config, 131072)

    assert_same_bits(table[list(POSITIONS)], contract.rope_table(config, list(POSITIONS)))


@configs
def test_every_position_of_a_short_context_has_the_contracts_bits(twin: Ops, config: ModelConfig):
    assert_same_bits(twin.rope_table(config, 300), contract.rope_table(config, list(range(300))))


@configs
def test_position_zero_does_not_rotate(twin: Ops, config: ModelConfig):
    row = twin.rope_table(config, 1)[0]

    assert (row[:32] == 0x3F80).all() and (row[32:] == 0).all()


def test_a_longer_table_begins_with_the_shorter_one(twin: Ops):
    assert_same_bits(twin.rope_table(LLAMA, 1000)[:100], twin.rope_table(LLAMA, 100))


def test_scaling_touches_exactly_the_long_wavelengths(twin: Ops):
    # wavelengths under 8192 / 4 stay; those over it are stretched
    scaled, plain = (twin.rope_table(CONFIGS[name], 64) for name in ("llama-3.2", "default"))
    wavelength = 2 * np.pi * 500000.0 ** (np.arange(32) / 32)

    same = (scaled == plain).reshape(64, 2, 32).all((0, 1))

    assert same[wavelength < 2048].all()
    assert not same[(wavelength > 2048) & (wavelength < 20000)].any()


def transformers_frequencies_and_rows(config: ModelConfig) -> tuple[np.ndarray, np.ndarray]:
    """inv_freq [32] float32 and the module's bf16 rows [positions, 64] as cos, then sin."""
    torch = pytest.importorskip("torch", reason="requires torch")
    transformers = pytest.importorskip("transformers", reason="requires transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    parameters = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        scaling = config.rope_scaling
        parameters |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
        }
    module = LlamaRotaryEmbedding(
        transformers.LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            num_key_value_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=parameters,
        )
    )
    x = torch.zeros(1, 1, 64, dtype=torch.bfloat16)
    cos, sin = module(x, torch.tensor([POSITIONS]))
    halves = [half[0, :, :32].contiguous().view(torch.uint16).numpy() for half in (cos, sin)]
    return module.inv_freq.float().numpy(), np.concatenate(halves, -1)


@configs
def test_transformers_rotary_module_has_the_same_rows(twin: Ops, config: ModelConfig):
    # pow, cos and sin of two libraries may differ in the last bit of float32; at position 131071
    # one bit of the frequency moves the angle by up to 2^-24 * 131071 of its size
    frequencies, expected = transformers_frequencies_and_rows(config)

    table = twin.rope_table(config, 131072)[list(POSITIONS)]

    ours, theirs = contract.widen(table), contract.widen(expected)
    angle_error = np.array(POSITIONS)[:, None] * frequencies * 2.0**-23
    allowed = np.tile(angle_error + 2.0**-8, 2)  # and a flip of the bf16 rounding below 1
    assert (np.abs(ours - theirs) <= allowed).all()
    assert (table != expected).mean() <= 1e-2
    assert_same_bits(table[0], expected[0])


@pytest.mark.parametrize("max_positions", [0, -1])
def test_an_empty_table_is_refused(twin: Ops, max_positions: int):
    library = twin.library
    table = library.ffi.new("uint16_t[64]")
    config = fill_model_config(library.ffi, LLAMA)

    with pytest.raises(InvalidArgument, match=f"max_positions is {max_positions}"):
        library.check(library.lib.op_rope_table(twin._context, table, config, max_positions))
