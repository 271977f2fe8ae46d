"""The decoder on one page against the same page composed from the reference operations.

Every tap of every layer, bit for bit: the order of the operations, which weight goes where, which
value is the residual, and what the taps are called.
"""

import numpy as np
import pytest

from engine.checkpoint import open_checkpoint
from engine.config import ModelConfig
from engine.model_runner import ModelRunner
from engine.models import resolve
from tests.system.trace import Trace, assert_same_trace, run, tokens
from tests.twin import contract


def load(name: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    directory = resolve(name)
    config = ModelConfig.from_directory(directory)
    with open_checkpoint(directory, config) as checkpoint:
        return config, {name: checkpoint.tensor(name).copy() for name in checkpoint.names()}


def decoder(config: ModelConfig, weights: dict[str, np.ndarray], ids: list[int]) -> Trace:
    """LlamaForCausalLM over one sequence from its start, in the contract's arithmetic."""
    table = contract.rope_table(config, list(range(len(ids))))
    eps = config.rms_norm_eps
    trace: Trace = {"embed 0": weights["model.embed_tokens.weight"][ids]}
    residual = trace["embed 0"]

    def heads(x: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(x.reshape(len(ids), -1, config.head_dim))

    for layer in range(config.num_layers):

        def weight(name: str, layer: int = layer) -> np.ndarray:
            return weights[f"model.layers.{layer}.{name}.weight"]

        t: Trace = {}
        t["attn_norm"] = contract.rms_norm(residual, weight("input_layernorm"), eps)
        for name in ("q", "k", "v"):
            t[name] = contract.linear(t["attn_norm"], weight(f"self_attn.{name}_proj"))
        for name in ("q", "k"):
            rotated = contract.rotary_embedding(heads(t[name]), table)
            t[f"{name}_rope"] = rotated.reshape(len(ids), -1)
        attn = contract.attention(heads(t["q_rope"]), heads(t["k_rope"]), heads(t["v"]), 0)
        t["attn"] = attn.reshape(len(ids), -1)
        t["o"] = contract.linear(t["attn"], weight("self_attn.o_proj"))
        t["attn_residual"] = contract.residual_add(residual, t["o"])
        t["mlp_norm"] = contract.rms_norm(
            t["attn_residual"], weight("post_attention_layernorm"), eps
        )
        for name in ("gate", "up"):
            t[name] = contract.linear(t["mlp_norm"], weight(f"mlp.{name}_proj"))
        t["act"] = contract.silu_and_mul(t["gate"], t["up"])
        t["down"] = contract.linear(t["act"], weight("mlp.down_proj"))
        residual = t["mlp_residual"] = contract.residual_add(t["attn_residual"], t["down"])
        trace |= {f"{name} {layer}": value for name, value in t.items()}
        trace |= {f"k_cache {layer}": heads(t["k_rope"]), f"v_cache {layer}": heads(t["v"])}
    trace["final_norm 0"] = contract.rms_norm(residual, weights["model.norm.weight"], eps)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    trace["logits"] = contract.linear_f32(trace["final_norm 0"], weights[f"{head}.weight"])
    trace["next_ids"] = trace["logits"].argmax(-1).astype(np.int32)
    return trace


@pytest.mark.parametrize("name", ["toy", "toy-untied", "toy-mha", "toy-plain-rope", "toy-gqa8"])
def test_every_tap_of_a_prefill_has_the_contracts_bits(make_runner, name: str):
    runner: ModelRunner = make_runner(name)
    config, weights = load(name)
    text = tokens(3, 18)

    assert_same_trace(run(runner, text, [18], [5, 2]), decoder(config, weights, text))


def test_every_tap_of_reductions_over_several_chunks_has_the_contracts_bits(make_runner):
    config, weights = load("toy-wide")
    text = tokens(4, 3)

    assert_same_trace(run(make_runner("toy-wide"), text, [3], [1]), decoder(config, weights, text))


def test_special_tokens_and_repetitions_are_tokens_like_any_other(make_runner):
    config, weights = load("toy")
    text = [config.bos_token_id, 0, 0, 0, config.vocab_size - 1, config.eos_token_ids[0]]

    assert_same_trace(run(make_runner("toy"), text, [6], [0]), decoder(config, weights, text))
