"""Models built by hand whose text is known: no reference computes what they must say.

Embeddings are one-hot, the head reads them back, and one layer alone does something; the other and
whatever is left out is zero. All norm weights that count are -1, so that what forgets a norm or
takes another layer's is seen; the norm of the half that is switched off is 0.
"""

from dataclasses import replace

import numpy as np
import pytest

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Engine, Library
from engine.config import EngineConfig, ModelConfig
from tests.system.weights import Weights, load
from tests.twin.bits import to_bf16

TOKENS = 96  # the first channels are the token's; the last one is 1 for every token
ALWAYS = 127
HEAD_DIM = 64
LOUDER = 8  # what a layer adds, against the token's own channel
TABLE = [5, 0, 3, 9, 1, 8, 2, 7, 4, 6]
ROOM = EngineConfig(
    "cpu",
    num_blocks=10,
    max_seq_len=160,
    max_num_tokens=160,
    max_num_seqs=1,
    block_size=16,
    num_threads=1,
)
TEXT = np.random.default_rng(3).integers(0, TOKENS, 60).tolist()


def silent(name: str) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """A model whose layers add nothing: it says its input again. Weights as float32."""
    config, weights = load(name)
    constructed = {key: np.zeros(value.shape, np.float32) for key, value in weights.items()}
    ids = np.arange(TOKENS)
    constructed["model.embed_tokens.weight"][ids, ids] = 1
    constructed["model.embed_tokens.weight"][:, ALWAYS] = 1
    constructed["lm_head.weight"][ids, ids] = -1  # the final norm's weight is -1 too
    constructed["model.norm.weight"][:] = -1
    return config, constructed


def counting(name: str, layer: int) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """One MLP makes each token the next one; its gate is open where up is below zero."""
    config, weights = silent(name)
    prefix, ids = f"model.layers.{layer}.", np.arange(TOKENS)
    weights[prefix + "post_attention_layernorm.weight"][:] = -1
    weights[prefix + "mlp.gate_proj.weight"][ids, ids] = -1
    weights[prefix + "mlp.up_proj.weight"][ids, ids] = 1
    weights[prefix + "mlp.down_proj.weight"][(ids + 1) % TOKENS, ids] = -LOUDER
    return config, weights


def looking_back(name: str, layer: int, distance: int) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """One attention reads the token so many before; its scores know nothing but the distance.

    A key is the same vector everywhere before its rotation, a query the one that fits a key turned
    back by the distance. The fastest pair is left out, whose angle no base of the table changes.
    """
    config, weights = silent(name)
    prefix = f"model.layers.{layer}."
    weights[prefix + "input_layernorm.weight"][:] = -1
    pairs = np.arange(1, HEAD_DIM // 2)
    angles = -distance * config.rope_theta ** (-2.0 * pairs / HEAD_DIM)
    group = config.num_heads // config.num_kv_heads
    for head in range(config.num_heads):
        query = weights[prefix + "self_attn.q_proj.weight"][head * HEAD_DIM : (head + 1) * HEAD_DIM]
        query[pairs, ALWAYS] = np.cos(angles)
        query[pairs + HEAD_DIM // 2, ALWAYS] = np.sin(angles)
    for kv_head in range(config.num_kv_heads):
        rows = slice(kv_head * HEAD_DIM, (kv_head + 1) * HEAD_DIM)
        weights[prefix + "self_attn.k_proj.weight"][rows][pairs, ALWAYS] = 1
        channels = kv_head * HEAD_DIM + np.arange(HEAD_DIM)
        weights[prefix + "self_attn.v_proj.weight"][channels, channels] = -1
        first = kv_head * group * HEAD_DIM + np.arange(HEAD_DIM)  # of the group's heads
        weights[prefix + "self_attn.o_proj.weight"][channels, first] = LOUDER
    return config, weights


def said(
    library: Library, config: ModelConfig, weights: dict[str, np.ndarray], steps: int
) -> tuple[list[int], list[int]]:
    """The arg-max after each token of the text, and what greedy steps go on with."""
    loaded: Weights = {key: to_bf16(value) for key, value in weights.items()}
    with Engine(library, config, ROOM) as engine:
        for key, values in loaded.items():
            engine.load_weight(key, np.ascontiguousarray(values))
        engine.finish_loading()
        ids = np.empty(len(TEXT), np.int32)
        engine.forward(build_batch([SequenceSlice(TEXT, 0, TABLE)], 16, "all"), next_ids=ids)
        last = build_batch([SequenceSlice([int(ids[-1])], len(TEXT), TABLE)], 16)
        last = replace(last, block_tables=np.array([TABLE], np.int32))  # for the steps to come
        return ids.tolist(), [int(ids[-1]), *engine.decode(last, steps)[:, 0].tolist()]


@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_that_counts_says_the_next_token(library: Library, layer: int):
    ids, more = said(library, *counting("toy-untied", layer), steps=30)

    assert ids == [(token + 1) % TOKENS for token in TEXT]
    assert more == [(TEXT[-1] + 1 + i) % TOKENS for i in range(31)]


@pytest.mark.parametrize("distance", [1, 4, 17])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_model_that_looks_back_says_what_stood_there(library: Library, layer: int, distance: int):
    config, weights = looking_back("toy-untied", layer, distance)
    config = replace(config, rope_scaling=None)

    ids, more = said(library, config, weights, steps=80)  # over the edge of a tile of 128 keys

    assert ids[distance:] == TEXT[:-distance]
    text = TEXT + more
    assert text[len(TEXT) :] == [text[i - distance - 1] for i in range(len(TEXT), len(text))]


def test_a_model_that_does_nothing_says_its_input(library: Library):
    ids, more = said(library, *silent("toy-untied"), steps=2)

    assert ids == TEXT and more == 3 * TEXT[-1:]
