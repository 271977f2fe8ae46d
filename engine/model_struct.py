"""Lay out what an engine is made of: the C structs EngineModelConfig and EngineOptions.

Knows the structs' fields; decides nothing.
"""

from engine.config import EngineConfig, ModelConfig


def fill_model_config(ffi: object, config: ModelConfig) -> object:
    """The C struct of a model's dimensions."""
    scaling = config.rope_scaling
    return ffi.new(
        "EngineModelConfig *",
        {
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_layers": config.num_layers,
            "num_heads": config.num_heads,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "tie_word_embeddings": int(config.tie_word_embeddings),
            "rms_norm_eps": config.rms_norm_eps,
            "rope_type": int(scaling is not None),
            "rope_theta": config.rope_theta,
            "rope_factor": scaling.factor if scaling else 1.0,
            "rope_low_freq_factor": scaling.low_freq_factor if scaling else 1.0,
            "rope_high_freq_factor": scaling.high_freq_factor if scaling else 1.0,
            "rope_original_max_position_embeddings": (
                scaling.original_max_position_embeddings if scaling else 0
            ),
        },
    )


def fill_options(ffi: object, config: EngineConfig, device: int) -> object:
    """The C struct of an engine's room; `device` is the number of config.device."""
    return ffi.new(
        "EngineOptions *",
        {
            "device": device,
            "num_threads": config.num_threads,
            "block_size": config.block_size,
            "num_blocks": config.num_blocks,
            "max_seq_len": config.max_seq_len,
            "max_num_tokens": config.max_num_tokens,
            "max_num_seqs": config.max_num_seqs,
            "enforce_eager": int(config.enforce_eager),
        },
    )
