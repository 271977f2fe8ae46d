from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest

from engine.checkpoint import open_checkpoint
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.sources.gguf_llama import convert_gguf
from engine.tokenizer import Tokenizer

VOCAB = ["<end>", "<start>", *[chr(33 + i) for i in range(94)], "Ġ", "11", "ab", "Ġab"]
VOCAB = list(dict.fromkeys(VOCAB))
MERGES = ["1 1", "a b", "Ġ ab"]  # "1 1" never applies: each digit stands alone
CONFIG = ModelConfig(
    vocab_size=len(VOCAB),
    hidden_size=192,
    intermediate_size=64,
    num_layers=2,
    num_heads=3,
    num_kv_heads=1,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=100000.0,
    rope_scaling=None,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_ids=(0,),
)
GGUF_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
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


def weight(name: str) -> np.ndarray:
    """Values of one tensor in transformers' order, exact in bfloat16."""
    shape = CONFIG.weight_shapes()[name]
    source = np.random.Generator(np.random.PCG64(sum(name.encode())))
    return source.normal(size=shape).astype(ml_dtypes.bfloat16).astype(np.float32)


def interleaved(values: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows as GGUF wants them: rotary partners side by side. Written as a loop, unlike the code."""
    half = values.shape[0] // num_heads // 2
    rows = []
    for head in range(num_heads):
        for i in range(half):
            rows += [values[head * 2 * half + i], values[head * 2 * half + half + i]]
    return np.stack(rows)


def write_gguf(
    path: Path, changes: dict[str, Any] | None = None, quantised: str = "", without: str = ""
) -> Path:
    changes = changes or {}
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(CONFIG.num_layers)
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_heads)
    writer.add_head_count_kv(CONFIG.num_kv_heads)
    writer.add_rope_freq_base(CONFIG.rope_theta)
    writer.add_rope_dimension_count(changes.get("rope_dimensions", 64))
    if "rope_scaling" in changes:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(changes.get("pre", "smollm"))
    writer.add_token_list(VOCAB)
    writer.add_token_types([3, 3] + [1] * (len(VOCAB) - 2))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    for name in CONFIG.weight_shapes():
        module = name.removesuffix(".weight")
        if name in GGUF_NAMES:
            gguf_name = GGUF_NAMES[name]
        else:
            _, _, layer, module = module.split(".", 3)
            gguf_name = f"blk.{layer}.{GGUF_NAMES[module]}.weight"
        if gguf_name == without:
            continue
        values = weight(name)
        if module.endswith("q_proj"):
            values = interleaved(values, CONFIG.num_heads)
        if module.endswith("k_proj"):
            values = interleaved(values, CONFIG.num_kv_heads)
        if gguf_name == quantised:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(gguf_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(gguf_name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(tmp_path: Path, **kwargs: Any) -> Path:
    directory = tmp_path / "model"
    directory.mkdir()
    convert_gguf(write_gguf(tmp_path / "model.gguf", **kwargs), directory)
    return directory


def test_every_weight_comes_out_in_the_order_of_transformers(tmp_path: Path):
    directory = convert(tmp_path)

    with open_checkpoint(directory, CONFIG) as checkpoint:
        for name in checkpoint.names():
            values = checkpoint.tensor(name).view(ml_dtypes.bfloat16).astype(np.float32)
            np.testing.assert_array_equal(values, weight(name), err_msg=name)


def test_the_config_comes_from_the_metadata(tmp_path: Path):
    assert ModelConfig.from_directory(convert(tmp_path)) == CONFIG


def test_quantised_values_are_dequantised_then_rounded_to_nearest_even(tmp_path: Path):
    name, gguf_name = "model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight"
    kind = gguf.GGMLQuantizationType.Q8_0
    exact = gguf.quants.dequantize(gguf.quants.quantize(weight(name), kind), kind)

    directory = convert(tmp_path, quantised=gguf_name)

    expected = exact.astype(ml_dtypes.bfloat16).view(np.uint16)
    assert (exact != exact.astype(ml_dtypes.bfloat16).astype(np.float32)).any()
    with open_checkpoint(directory, CONFIG) as checkpoint:
        np.testing.assert_array_equal(checkpoint.tensor(name), expected)


def test_the_tokenizer_splits_digits_merges_and_keeps_control_tokens(tmp_path: Path):
    tokenizer = Tokenizer.from_directory(convert(tmp_path))
    id_of = {token: i for i, token in enumerate(VOCAB)}

    assert tokenizer.encode("ab ab") == [id_of["ab"], id_of["Ġab"]]
    assert tokenizer.encode("11") == [id_of["1"]] * 2
    assert tokenizer.encode("<start>a") == [1, id_of["a"]]
    assert tokenizer.decode([1, *tokenizer.encode("ab 1!")]) == "ab 1!"
    assert tokenizer.render_chat([{"role": "user", "content": "x"}]) == "x"


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"changes": {"architecture": "qwen2"}}, "general.architecture must be 'llama'"),
        ({"changes": {"rope_dimensions": 32}}, "llama.rope.dimension_count must be 64, got 32"),
        ({"changes": {"rope_scaling": True}}, "llama.rope.scaling.type is not implemented"),
        ({"changes": {"pre": "llama-bpe"}}, "tokenizer must be gpt2 with pre 'smollm'"),
        ({"without": "blk.1.attn_k.weight"}, "'blk.1.attn_k.weight' is missing or not known"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(tmp_path: Path, kwargs, expected):
    with pytest.raises(CheckpointError, match=expected):
        convert(tmp_path, **kwargs)


def test_progress_ends_at_the_whole(tmp_path: Path):
    source = write_gguf(tmp_path / "model.gguf")
    (tmp_path / "model").mkdir()
    reports: list[tuple[int, int]] = []

    convert_gguf(source, tmp_path / "model", lambda done, total: reports.append((done, total)))

    assert [done for done, _ in reports] == sorted({done for done, _ in reports})
    assert reports[-1][0] == reports[-1][1]
