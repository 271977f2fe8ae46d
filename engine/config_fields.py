"""Read the fields of an untrusted, parsed `config.json`, and refuse what is not implemented.

Decides which fields change a result: each of those is either read here or refused by name. Knows
JSON values and their types; knows nothing of the ranges that `ModelConfig` checks.
"""

from typing import Any

from engine.errors import CheckpointError

# Field of config.json -> values under which it changes nothing. Any other value is refused by name.
# None stands for null; an absent field is always fine.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    # code or formats that are not loaded
    "auto_map": (None,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "dtype": (None, "bfloat16"),
    "torch_dtype": (None, "bfloat16"),
    # attention
    "attention_bias": (None, False),
    "qkv_bias": (None, False),
    "sliding_window": (None,),
    "use_sliding_window": (None, False),
    "attention_chunk_size": (None,),
    "attn_logit_softcapping": (None,),
    "attention_multiplier": (None,),
    "query_pre_attn_scalar": (None,),
    "attn_temperature_tuning": (None, False, 0),
    "clip_qkv": (None,),
    "qk_norm": (None, False),
    "use_qk_norm": (None, False),
    "qk_layernorm": (None, False),
    "alibi": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "pruned_heads": (None, {}),
    # rotary embedding
    "partial_rotary_factor": (None, 1.0),
    "rotary_pct": (None, 1.0),
    "rope_interleaved": (None, False),
    "no_rope_layers": (None, []),
    "no_rope_layer_interval": (None,),
    # feed-forward
    "hidden_act": (None, "silu"),
    "hidden_activation": (None, "silu"),
    "mlp_bias": (None, False),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "num_nextn_predict_layers": (None, 0),
    # scales
    "logit_scale": (None, 1.0),
    "logits_scaling": (None, 1.0),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (None, 1.0),
    "residual_multiplier": (None, 1.0),
    "scale_emb": (None, 1.0),
    "scale_depth": (None,),
    "dim_model_base": (None,),
    "lm_head_bias": (None, False),
    "norm_type": (None, "rms_norm"),
    "pretraining_tp": (None, 1),
}

_ROPE_KEYS = {
    "default": {"rope_theta", "rope_type", "type", "partial_rotary_factor"},
    "llama3": {
        "rope_theta",
        "rope_type",
        "type",
        "partial_rotary_factor",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


def refuse_other_architectures(config: dict[str, Any]) -> None:
    """Refuse, by name, whatever would change the result and is not implemented."""
    if config.get("model_type") != "llama":
        raise CheckpointError(f"model_type must be 'llama', got {config.get('model_type')!r}")
    architectures = config.get("architectures")
    if architectures is not None and architectures != ["LlamaForCausalLM"]:
        raise CheckpointError(f"architectures must be ['LlamaForCausalLM'], got {architectures!r}")
    for name, neutral in _NEUTRAL_VALUES.items():
        if name in config and not any(_same(config[name], value) for value in neutral):
            shown = " or ".join(repr(value) for value in neutral if value is not None) or "absent"
            raise CheckpointError(f"{name} must be {shown}, got {config[name]!r}: not implemented")
    layer_types = config.get("layer_types")
    if layer_types is not None and (
        not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types)
    ):
        raise CheckpointError(f"layer_types must all be 'full_attention', got {layer_types!r}")


def rope_fields(config: dict[str, Any]) -> tuple[float, tuple[float, float, float, int] | None]:
    """Theta and scaling from either spelling; both at once must agree.

    Returns:
        Theta, and for `llama3` the values of RopeScaling in the order of its fields; None for plain
        rotary embedding.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for name in ("rope_parameters", "rope_scaling"):
        value = config.get(name)
        if value is None:
            continue
        if not isinstance(value, dict):
            raise CheckpointError(f"{name} must be an object, got {value!r}")
        found.append((name, without_null(value)))
    parsed = {_rope_scaling(name, value) for name, value in found}
    if len(parsed) > 1:
        raise CheckpointError("rope_parameters and rope_scaling contradict each other")

    thetas = [required_number(value, "rope_theta") for _, value in found if "rope_theta" in value]
    if config.get("rope_theta") is not None:
        thetas.append(required_number(config, "rope_theta"))
    if len(set(thetas)) > 1:
        raise CheckpointError(f"rope_theta must have one value, got {sorted(set(thetas))}")
    theta = thetas[0] if thetas else 10000.0  # transformers' default for llama
    return theta, next(iter(parsed), None)


def _rope_scaling(name: str, value: dict[str, Any]) -> tuple[float, float, float, int] | None:
    """One rotary object of config.json, without its theta."""
    kind = value.get("rope_type", value.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise CheckpointError(f"{name}.rope_type must be one of {sorted(_ROPE_KEYS)}, got {kind!r}")
    if value.get("type", kind) != kind:
        raise CheckpointError(f"{name}.type {value['type']!r} contradicts rope_type {kind!r}")
    unknown = sorted(set(value) - _ROPE_KEYS[kind])
    if unknown:
        raise CheckpointError(f"{name}.{unknown[0]} is not implemented for rope_type {kind!r}")
    if not _same(value.get("partial_rotary_factor", 1.0), 1.0):
        raise CheckpointError(
            f"{name}.partial_rotary_factor must be 1.0, got {value['partial_rotary_factor']!r}"
        )
    if kind == "default":
        return None
    try:
        return (
            required_number(value, "factor"),
            required_number(value, "low_freq_factor"),
            required_number(value, "high_freq_factor"),
            required_int(value, "original_max_position_embeddings"),
        )
    except CheckpointError as error:
        raise CheckpointError(f"{name}.{error}") from error


def eos_token_ids(value: Any) -> tuple[int, ...]:
    """One id, a list of them, or null."""
    if value is None:
        return ()
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not is_int(item):
            raise CheckpointError(
                f"eos_token_id must be an integer or a list of them, got {value!r}"
            )
    return tuple(dict.fromkeys(values))  # each once, in order


def required_int(config: dict[str, Any], name: str) -> int:
    """An integer that must be there."""
    value = optional_int(config, name)
    if value is None:
        raise CheckpointError(f"{name} is missing")
    return value


def optional_int(config: dict[str, Any], name: str) -> int | None:
    """An integer, or None where the field is absent or null."""
    value = config.get(name)
    if value is not None and not is_int(value):
        raise CheckpointError(f"{name} must be an integer, got {value!r}")
    return value


def required_number(config: dict[str, Any], name: str) -> float:
    """A number that must be there, as a float."""
    value = config.get(name)
    if value is None:
        raise CheckpointError(f"{name} is missing")
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise CheckpointError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError as error:
        raise CheckpointError(
            f"{name} must be finite, got an integer of {len(str(value))} digits"
        ) from error


def is_int(value: Any) -> bool:
    """Whether a JSON value is an integer; true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


def _same(value: Any, expected: Any) -> bool:
    """Equal, and not merely because Python takes True for 1."""
    return isinstance(value, bool) == isinstance(expected, bool) and value == expected


def without_null(value: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not null."""
    return {key: item for key, item in value.items() if item is not None}
