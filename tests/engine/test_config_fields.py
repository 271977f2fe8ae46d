"""Fields of config.json that change a result and are not implemented: each is refused by name."""

import re
from dataclasses import replace
from typing import Any

import pytest

from engine.config import ModelConfig
from engine.config_fields import _NEUTRAL_VALUES
from engine.errors import CheckpointError, InvalidArgument
from tests.engine.test_config import published

SWITCHES = (
    "attention_bias",
    "qkv_bias",
    "use_sliding_window",
    "attn_temperature_tuning",
    "qk_norm",
    "use_qk_norm",
    "qk_layernorm",
    "alibi",
    "add_cross_attention",
    "is_encoder_decoder",
    "rope_interleaved",
    "mlp_bias",
    "lm_head_bias",
)
# What some model has there; it computes something else than this engine does.
OF_SOME_MODEL: dict[str, Any] = {
    **dict.fromkeys(SWITCHES, True),
    "auto_map": {"AutoModel": "theirs.Model"},
    "quantization_config": {"bits": 4},
    "compression_config": {"format": "int8"},
    "dtype": "float16",
    "torch_dtype": "float32",
    "sliding_window": 4096,
    "attention_chunk_size": 8192,
    "attn_logit_softcapping": 50.0,
    "attention_multiplier": 0.015625,
    "query_pre_attn_scalar": 256,
    "clip_qkv": 8.0,
    "pruned_heads": {"0": [1]},
    "partial_rotary_factor": 0.5,
    "rotary_pct": 0.25,
    "no_rope_layers": [0, 1],
    "no_rope_layer_interval": 4,
    "hidden_act": "gelu",
    "hidden_activation": "gelu_pytorch_tanh",
    "num_experts": 8,
    "num_local_experts": 8,
    "num_nextn_predict_layers": 1,
    "logit_scale": 0.0625,
    "logits_scaling": 8.0,
    "final_logit_softcapping": 30.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "dim_model_base": 256,
    "norm_type": "layer_norm",
    "pretraining_tp": 2,
}


def test_every_field_that_changes_a_result_is_tried_here():
    assert set(OF_SOME_MODEL) == set(_NEUTRAL_VALUES)


@pytest.mark.parametrize(("field", "value"), OF_SOME_MODEL.items())
def test_a_field_of_another_model_is_refused_by_name_and_value(field: str, value: Any):
    with pytest.raises(CheckpointError, match=f"^{field} must be .*, got {re.escape(repr(value))}"):
        ModelConfig.from_dict(published(**{field: value}))


@pytest.mark.parametrize("field", OF_SOME_MODEL)
def test_the_same_field_without_a_meaning_changes_nothing(field: str):
    for neutral in (None, *_NEUTRAL_VALUES[field]):
        assert ModelConfig.from_dict(published(**{field: neutral})) == ModelConfig.from_dict(
            published()
        )


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
@pytest.mark.parametrize("value", [True, "1e-5", [1.0], float("inf"), -1.0], ids=repr)
def test_what_is_no_number_of_that_range_is_refused(field: str, value: Any):
    with pytest.raises(CheckpointError, match=field):
        ModelConfig.from_dict(published(**{field: value}))


@pytest.mark.parametrize("field", ["rms_norm_eps", "rope_theta"])
def test_a_config_made_in_python_takes_no_truth_value_for_a_number(field: str):
    with pytest.raises(InvalidArgument, match=field):
        replace(ModelConfig.from_dict(published()), **{field: True})
