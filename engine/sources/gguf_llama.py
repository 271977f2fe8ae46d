"""Rewrite a Llama-architecture GGUF file as a model directory in Hugging Face form.

Holds the map between the two formats: tensor names, the row order of q and k, metadata keys, and
the byte-level BPE tokenizer. Dequantised values are rounded to bfloat16, nearest even; that is the
one loss, and it is taken once. Knows nothing of where the file came from.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.sources.model_directory import write_json, write_safetensors
from engine.sources.random_weights import to_bf16
from engine.sources.toy import config_json, generation_config_json

_LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def convert_gguf(
    source: Path, directory: Path, on_bytes: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Write config, weights and tokenizer of a GGUF file into a directory.

    Args:
        source: a GGUF file that is trusted (its hash was checked): the parser is not hardened.
        directory: exists, and is filled.
        on_bytes: told the bytes of weights written and in all.

    Raises:
        CheckpointError: the file holds another architecture, tokenizer or set of tensors.
    """
    reader = gguf.GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(fields, tied="output.weight" not in tensors)
    shapes = config.weight_shapes()
    names = {name: _gguf_name(name) for name in shapes}
    if set(names.values()) != set(tensors):
        odd = sorted(set(names.values()) ^ set(tensors))
        raise CheckpointError(f"{source}: tensor {odd[0]!r} is missing or not known")

    total = 2 * sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values())
    done = 0

    def written(count: int) -> None:
        nonlocal done
        done += count
        on_bytes(done, total)

    def chunks_of(name: str) -> Iterator[np.ndarray]:
        tensor = tensors[names[name]]
        values = np.ascontiguousarray(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32
        )
        if values.shape != shapes[name]:
            raise CheckpointError(
                f"{source}: {tensor.name}: shape must be {shapes[name]}, got {values.shape}"
            )
        if name.endswith("q_proj.weight"):
            values = _half_split_rows(values, config.num_heads)
        if name.endswith("k_proj.weight"):
            values = _half_split_rows(values, config.num_kv_heads)
        yield to_bf16(values)

    write_json(directory / "config.json", config_json(config))
    write_json(directory / "generation_config.json", generation_config_json(config))
    _tokenizer(fields).save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", _tokenizer_config(fields))
    write_safetensors(directory / "model.safetensors", shapes, chunks_of, written)


def _gguf_name(name: str) -> str:
    """GGUF's name of one of `ModelConfig.weight_shapes`."""
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, module = name.removesuffix(".weight").split(".", 3)
    return f"blk.{layer}.{_LAYER_TENSORS[module]}.weight"


def _half_split_rows(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of q or k from GGUF's order (rotary pairs adjacent) to transformers' (two halves)."""
    rows, cols = values.shape
    pairs = values.reshape(num_heads, rows // num_heads // 2, 2, cols)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows, cols)


def _config(fields: dict[str, Any], tied: bool) -> ModelConfig:
    def field(name: str) -> Any:
        if name not in fields:
            raise CheckpointError(f"GGUF field {name} is missing")
        return fields[name]

    if field("general.architecture") != "llama":
        raise CheckpointError(
            "GGUF field general.architecture must be 'llama', "
            f"got {fields['general.architecture']!r}"
        )
    scaled = sorted(name for name in fields if name.startswith("llama.rope.scaling."))
    if scaled:
        raise CheckpointError(f"GGUF field {scaled[0]} is not implemented")
    head_dim = field("llama.embedding_length") // field("llama.attention.head_count")
    if field("llama.rope.dimension_count") != head_dim:
        raise CheckpointError(
            f"GGUF field llama.rope.dimension_count must be {head_dim}, "
            f"got {fields['llama.rope.dimension_count']}"
        )
    return ModelConfig(
        vocab_size=len(field("tokenizer.ggml.tokens")),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_layers=field("llama.block_count"),
        num_heads=field("llama.attention.head_count"),
        num_kv_heads=field("llama.attention.head_count_kv"),
        head_dim=head_dim,
        rms_norm_eps=_shortest(field("llama.attention.layer_norm_rms_epsilon")),
        rope_theta=_shortest(field("llama.rope.freq_base")),
        rope_scaling=None,
        max_position_embeddings=field("llama.context_length"),
        tie_word_embeddings=tied,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_ids=(field("tokenizer.ggml.eos_token_id"),),
    )


def _shortest(value: float) -> float:
    """The shortest decimal that gives this float32: 1e-05, not 9.99999974e-06."""
    return float(str(np.float32(value)))


def _tokenizer(fields: dict[str, Any]) -> Tokenizer:
    """Byte-level BPE as GGUF describes it; every control token is special."""
    kind = (fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise CheckpointError(f"GGUF tokenizer must be gpt2 with pre 'smollm', got {kind}")
    tokens, types = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: token_id for token_id, token in enumerate(tokens)},
            merges=[tuple(merge.split(" ", 1)) for merge in fields["tokenizer.ggml.merges"]],
        )
    )
    # 'smollm': each digit on its own, then the split of GPT-2.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind_of_token in zip(tokens, types, strict=True)
            if kind_of_token == gguf.TokenType.CONTROL
        ]
    )
    return tokenizer


def _tokenizer_config(fields: dict[str, Any]) -> dict[str, Any]:
    tokens = fields["tokenizer.ggml.tokens"]
    result: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = fields.get(f"tokenizer.ggml.{key}_token_id")
        if token_id is not None:
            result[f"{name}_token"] = tokens[token_id]
    result["model_max_length"] = fields["llama.context_length"]
    result["clean_up_tokenization_spaces"] = False
    if "tokenizer.chat_template" in fields:
        result["chat_template"] = fields["tokenizer.chat_template"]
    return result
