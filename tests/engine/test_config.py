import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import EngineConfig, ModelConfig, RopeScaling
from engine.errors import CheckpointError, InvalidArgument
from engine.sources.shape import CONFIG as LLAMA_3_2_1B
from engine.sources.toy import CONFIGS, config_json

# config.json of Llama 3.2 1B Instruct, as it is published.
PUBLISHED: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
LLAMA3_ROPE = PUBLISHED["rope_scaling"]


def published(**changes: Any) -> dict[str, Any]:
    """The published config with some fields changed; a change to `...` removes the field."""
    merged = {**PUBLISHED, **changes}
    return {name: value for name, value in merged.items() if value is not ...}


def test_the_published_llama_3_2_config_is_understood():
    assert ModelConfig.from_dict(PUBLISHED) == LLAMA_3_2_1B


@pytest.mark.parametrize(
    "spelling",
    [
        {
            "rope_scaling": ...,
            "rope_theta": ...,
            "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 5e5},
        },
        {"rope_scaling": ..., "rope_parameters": LLAMA3_ROPE},
        {"rope_theta": ..., "rope_scaling": {**LLAMA3_ROPE, "rope_theta": 500000}},
        {"rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}},
        {"rope_parameters": None},
    ],
    ids=["theta-inside", "theta-outside", "scaling-with-theta", "both-agree", "null"],
)
def test_every_spelling_of_the_rotary_fields_means_the_same(spelling):
    assert ModelConfig.from_dict(published(**spelling)) == LLAMA_3_2_1B


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": None},
        {"rope_scaling": ...},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": ..., "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
    ],
    ids=["null", "absent", "default", "old-name-of-type", "transformers-5"],
)
def test_a_plain_rotary_embedding_has_no_scaling(rope):
    config = ModelConfig.from_dict(published(**rope))

    assert config.rope_scaling is None
    assert config.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {**LLAMA3_ROPE, "rope_theta": 10000.0}}, "rope_theta"),
        ({"rope_parameters": {**LLAMA3_ROPE, "factor": 8.0}}, "rope_parameters"),
        ({"rope_scaling": {**LLAMA3_ROPE, "type": "linear"}}, "rope_scaling.type"),
        ({"rope_scaling": {**LLAMA3_ROPE, "rope_type": "yarn"}}, "yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "longrope"),
        ({"rope_scaling": {**LLAMA3_ROPE, "attention_factor": 1.0}}, "attention_factor"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "factor"),
        ({"rope_scaling": {**LLAMA3_ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": None}}, "factor"),
        ({"rope_scaling": {**LLAMA3_ROPE, "factor": 0.5}}, "factor"),
        ({"rope_scaling": {**LLAMA3_ROPE, "high_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {**LLAMA3_ROPE, "low_freq_factor": 0}}, "low_freq_factor"),
        (
            {"rope_scaling": {**LLAMA3_ROPE, "original_max_position_embeddings": 0}},
            "original_max_position_embeddings",
        ),
        ({"rope_parameters": {"full_attention": LLAMA3_ROPE}}, "full_attention"),
        ({"rope_scaling": "llama3"}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": ["llama3"]}}, "rope_type"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"rope_theta": "500000"}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
    ],
)
def test_a_rotary_embedding_that_is_not_implemented_is_refused_by_name(changes, expected):
    with pytest.raises(CheckpointError, match=expected):
        ModelConfig.from_dict(published(**changes))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model_type", "mistral"),
        ("model_type", ...),
        ("architectures", ["LlamaForSequenceClassification"]),
        ("architectures", []),
        ("auto_map", {"AutoModelForCausalLM": "modeling.Model"}),
        ("quantization_config", {"quant_method": "gptq"}),
        ("torch_dtype", "float16"),
        ("dtype", "float32"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("sliding_window", 4096),
        ("hidden_act", "gelu"),
        ("hidden_act", "relu"),
        ("partial_rotary_factor", 0.5),
        ("pretraining_tp", 2),
        ("logit_scale", 0.0625),
        ("logits_scaling", 8.0),
        ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0),
        ("embedding_multiplier", 12.0),
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.015625),
        ("num_local_experts", 8),
        ("layer_types", ["full_attention", "sliding_attention"]),
        ("layer_types", "full_attention"),
        ("rope_interleaved", True),
        ("is_encoder_decoder", True),
        ("use_qk_norm", True),
        ("head_dim", 128),
        ("head_dim", 63),
        ("hidden_size", 2048 + 32),
        ("intermediate_size", 8192 - 1),
        ("num_key_value_heads", 5),
        ("num_key_value_heads", 0),
        ("num_attention_heads", -32),
        ("num_attention_heads", 0),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", "16"),
        ("num_hidden_layers", 16.0),
        ("num_hidden_layers", True),
        ("num_hidden_layers", ...),
        ("vocab_size", 2**31),
        ("vocab_size", None),
        ("max_position_embeddings", 0),
        ("rms_norm_eps", 0.0),
        ("rms_norm_eps", -1e-5),
        ("rms_norm_eps", ...),
        ("tie_word_embeddings", "true"),
        ("tie_word_embeddings", 1),
        ("bos_token_id", 128256),
        ("bos_token_id", [1]),
        ("eos_token_id", [128001, 128256]),
        ("eos_token_id", -1),
        ("eos_token_id", "</s>"),
        ("eos_token_id", [True]),
    ],
)
def test_a_field_that_would_change_the_result_is_refused_by_name_and_value(name, value):
    with pytest.raises(CheckpointError) as refusal:
        ModelConfig.from_dict(published(**{name: value}))

    message = str(refusal.value)
    assert name in message
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        assert repr(value) in message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initializer_range", 0.5),
        ("use_cache", False),
        ("_name_or_path", "somewhere/else"),
        ("attention_dropout", 0.1),  # of training
        ("layer_types", ["full_attention"] * 16),
        ("sliding_window", None),
        ("partial_rotary_factor", 1),
        ("a_field_of_some_later_version", {"deep": [1]}),
    ],
)
def test_a_field_that_changes_nothing_is_ignored(name, value):
    assert ModelConfig.from_dict(published(**{name: value})) == LLAMA_3_2_1B


def test_absent_fields_have_the_defaults_of_transformers():
    config = ModelConfig.from_dict(
        published(
            num_key_value_heads=...,
            head_dim=...,
            tie_word_embeddings=...,
            rope_theta=...,
            rope_scaling=...,
        )
    )

    assert config.num_kv_heads == config.num_heads == 32
    assert config.head_dim == 2048 // 32
    assert config.tie_word_embeddings is False
    assert config.rope_theta == 10000.0


def test_heads_times_head_dim_may_differ_from_the_hidden_size():
    config = ModelConfig.from_dict(published(num_attention_heads=16))

    assert config.num_heads * config.head_dim == 1024
    assert config.weight_shapes()["model.layers.0.self_attn.o_proj.weight"] == (2048, 1024)


@pytest.mark.parametrize(
    ("in_config", "in_generation", "expected"),
    [
        (2, None, (2,)),
        ([3, 2, 3], None, (3, 2)),
        (None, None, ()),
        (2, {"eos_token_id": [5, 6]}, (5, 6)),
        (2, {"eos_token_id": None}, (2,)),
        (2, {}, (2,)),
        (None, {"eos_token_id": 7}, (7,)),
        (0, None, (0,)),
        (128255, None, (128255,)),
    ],
)
def test_the_ids_that_end_an_answer_come_from_either_file(in_config, in_generation, expected):
    config = ModelConfig.from_dict(published(eos_token_id=in_config), in_generation)

    assert config.eos_token_ids == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_every_toy_config_survives_its_json_form(name):
    assert (
        ModelConfig.from_dict(json.loads(json.dumps(config_json(CONFIGS[name])))) == CONFIGS[name]
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_the_expected_tensors_are_those_of_transformers(name):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = CONFIGS[name]
    with torch.device("meta"):
        theirs = LlamaForCausalLM(LlamaConfig(**config_json(config))).state_dict()
    if config.tie_word_embeddings:
        del theirs["lm_head.weight"]  # the same storage as the embedding; a checkpoint has it once

    assert config.weight_shapes() == {name: tuple(value.shape) for name, value in theirs.items()}


def test_a_directory_is_read_with_both_its_files(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')

    assert ModelConfig.from_directory(tmp_path).eos_token_ids == (9,)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "no such file"),
        (b"", "not valid JSON"),
        (b"[]", "must be a JSON object"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"model_type": "llama", "model_type": "llama"}', "'model_type' appears twice"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b'{"a": ' + b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"model_type": "gpt2"}', "model_type must be 'llama', got 'gpt2'"),
    ],
    ids=["missing", "empty", "array", "nan", "twice", "utf-8", "deep", "digits", "architecture"],
)
def test_a_damaged_config_file_is_refused_with_its_path(tmp_path: Path, content, expected):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)

    with pytest.raises(CheckpointError, match=expected) as refusal:
        ModelConfig.from_directory(tmp_path)

    assert str(tmp_path / "config.json") in str(refusal.value)


def test_a_config_over_the_size_limit_is_refused_unread(tmp_path: Path):
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate((64 << 20) + 1)

    with pytest.raises(CheckpointError, match=f"size is {(64 << 20) + 1} bytes, the limit is"):
        ModelConfig.from_directory(tmp_path)


def test_a_config_linked_from_outside_the_directory_is_refused(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere.json").write_text(json.dumps(PUBLISHED))
    (tmp_path / "model" / "config.json").symlink_to(tmp_path / "elsewhere.json")

    with pytest.raises(CheckpointError, match="link out of the model directory"):
        ModelConfig.from_directory(tmp_path / "model")


def test_a_missing_directory_is_refused_with_its_path(tmp_path: Path):
    with pytest.raises(CheckpointError, match="nowhere: no such model directory"):
        ModelConfig.from_directory(tmp_path / "nowhere")


TEXTS = st.text("aé_0", max_size=4)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=5,
)
ROPE_NAMES = st.sampled_from([*LLAMA3_ROPE, "rope_theta", "type", "partial_rotary_factor"])


@settings(derandomize=True)
@given(
    changes=st.dictionaries(st.sampled_from(sorted(PUBLISHED)), JSON_VALUES, max_size=3),
    rope=st.dictionaries(ROPE_NAMES, JSON_VALUES, max_size=2),
)
def test_any_json_gives_a_config_or_a_checkpoint_error(changes, rope):
    fields = {**PUBLISHED, "rope_scaling": {**LLAMA3_ROPE, **rope}, **changes}

    try:
        config = ModelConfig.from_dict(fields)
    except CheckpointError:
        return

    assert config.num_heads % config.num_kv_heads == 0
    assert config.head_dim == 64
    assert config.hidden_size % 64 == config.intermediate_size % 64 == 0


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"device": "gpu"}, "device must be 'cpu' or 'cuda', got 'gpu'"),
        ({"num_threads": -1}, "num_threads must be an integer from 0 to 2147483647, got -1"),
        ({"block_size": 0}, "block_size must be one of"),
        ({"block_size": 48}, "got 48"),
        ({"block_size": 256}, "got 256"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"num_blocks": 2**31 // 128}, "num_blocks \\* block_size"),
        ({"max_seq_len": 0}, "max_seq_len"),
        ({"max_num_tokens": 0}, "max_num_tokens"),
        ({"max_num_seqs": 2**31}, "max_num_seqs"),
        ({"max_num_seqs": 1.0}, "max_num_seqs"),
        ({"enforce_eager": 1}, "enforce_eager must be True or False, got 1"),
    ],
)
def test_an_engine_without_room_is_refused_by_name(change, expected):
    room = {
        "device": "cpu",
        "num_blocks": 1,
        "max_seq_len": 1,
        "max_num_tokens": 1,
        "max_num_seqs": 1,
    }
    EngineConfig(**room)

    with pytest.raises(InvalidArgument, match=expected):
        EngineConfig(**{**room, **change})


def test_configs_cannot_be_changed():
    for config in (LLAMA_3_2_1B, RopeScaling(8.0, 1.0, 4.0, 64)):
        with pytest.raises(AttributeError):
            config.factor = 1.0
