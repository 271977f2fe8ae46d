import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from engine.models import resolve
from verification import oracle
from verification.oracle import OracleError, Reference, concatenated
from verification.taps import POINT, all_keys

TOKENS = [72, 101, 108, 108, 111]


@pytest.fixture(scope="module")
def yardstick() -> Reference:
    return Reference(resolve("toy"), torch.bfloat16)


@pytest.fixture(scope="module")
def float32() -> Reference:
    return Reference(resolve("toy"), torch.float32)


def test_a_trace_holds_every_tap_in_order_and_shape(yardstick):
    from engine.config import ModelConfig

    config = ModelConfig.from_directory(resolve("toy"))
    trace = yardstick.run(TOKENS, [1, 4])

    assert list(trace) == list(all_keys(2))
    for (name, _), value in trace.items():
        rows = 2 if name in ("final_norm", "logits") else len(TOKENS)
        assert value.shape == (rows, POINT[name].width(config)), name
        assert value.dtype == torch.bfloat16


def test_taps_are_what_each_other_say(yardstick):
    # Each is recomputed from others by transformers' own rounding, so a swapped hook would show.
    trace = yardstick.run(TOKENS, range(5))
    for layer in range(2):
        before = trace["embed", 0] if layer == 0 else trace["mlp_residual", layer - 1]
        block = yardstick.model.model.layers[layer]
        assert torch.equal(trace["attn_residual", layer], before + trace["o", layer])
        down = trace["attn_residual", layer] + trace["down", layer]
        assert torch.equal(trace["mlp_residual", layer], down)
        act = nn.functional.silu(trace["gate", layer]) * trace["up", layer]
        assert torch.equal(trace["act", layer], act)
        with torch.inference_mode():
            assert torch.equal(trace["attn_norm", layer], block.input_layernorm(before))
            assert torch.equal(trace["o", layer], block.self_attn.o_proj(trace["attn", layer]))
            assert torch.equal(trace["v", layer], block.self_attn.v_proj(trace["attn_norm", layer]))


def test_the_first_token_attends_to_itself_alone(float32):
    trace = float32.run(TOKENS, [0])
    v = trace["v", 0][0].view(2, 64)

    # softmax of one score is 1, the others' weight is 0, and both products are exact
    assert torch.equal(trace["attn", 0][0].view(2, 2, 64), v[:, None, :].expand(2, 2, 64))


def test_position_zero_is_not_rotated(yardstick):
    trace = yardstick.run(TOKENS, [0])

    assert torch.equal(trace["q_rope", 1][0], trace["q", 1][0])
    assert not torch.equal(trace["q_rope", 1][1], trace["q", 1][1])


def test_logits_are_those_of_the_whole_model(float32):
    rows = [0, 3, 4]
    with torch.inference_mode():
        expected = float32.model(input_ids=torch.tensor([TOKENS])).logits[0]

    along = float32.along(float32.read(TOKENS[:1]), TOKENS[1:])[rows]

    assert torch.equal(float32.run(TOKENS, range(5))["logits", 0], expected)
    # the same sums in another order: ten ulps of float32 at logits of 8, 2^-20 each
    assert torch.allclose(along, expected[rows], atol=1e-5)


def test_a_greedy_text_is_the_one_that_generate_gives(float32):
    with torch.inference_mode():
        generated = float32.model.generate(
            torch.tensor([TOKENS]), max_new_tokens=6, min_new_tokens=6, do_sample=False
        )[0, len(TOKENS) :]
    greedy = float32.greedy(float32.read(TOKENS), 6)

    assert float32.model.generation_config.eos_token_id not in greedy.token_ids
    assert list(greedy.token_ids) == generated.tolist()
    assert greedy.logits.shape == (6, 320)
    assert greedy.logits.argmax(-1).tolist() == list(greedy.token_ids)


@pytest.mark.parametrize("right", [0, 1, 3, 5, 6, 9])
def test_a_draft_enters_no_choice(float32, right):
    plain = float32.greedy(float32.read(TOKENS), 6)
    draft = [*plain.token_ids[:right], *[(t + 1) % 320 for t in plain.token_ids[right:]], 5, 5, 5]
    drafted = float32.greedy(float32.read(TOKENS), 6, draft)

    assert drafted.token_ids == plain.token_ids
    # rows of one forward pass against steps over a cache: sums of float32 in another order, twice
    # through each layer; 1e-4 is 2^-17 of a logit of 10, a hundred ulps
    assert torch.allclose(drafted.logits, plain.logits, atol=1e-4)


def test_a_traced_run_leaves_the_same_past_as_an_untraced_one(float32):
    _, traced = float32.run_and_keep(TOKENS, [4])
    untraced = float32.read(TOKENS)

    assert torch.equal(float32.along(traced, [1, 2]), float32.along(untraced, [1, 2]))


def test_along_an_empty_text_there_is_the_choice_after_the_sequence_alone(float32):
    past = float32.read(TOKENS)

    assert torch.equal(float32.along(past, []), past.logits)


def test_hooks_are_gone_after_a_run_and_after_a_failure(yardstick):
    original = modeling_llama.apply_rotary_pos_emb
    yardstick.run(TOKENS, [0])
    with pytest.raises(IndexError):
        yardstick.run([10**9], [0])

    assert modeling_llama.apply_rotary_pos_emb is original
    assert not any(
        module._forward_hooks or module._forward_pre_hooks for module in yardstick.model.modules()
    )


def test_a_forward_pass_that_goes_another_way_is_noticed(yardstick, monkeypatch):
    monkeypatch.setitem(oracle._OUTPUT_TAPS, "mlp.down_proj", "gate")  # down is then never seen

    with pytest.raises(OracleError, match="down"):
        yardstick.run(TOKENS, [0])


def test_rotation_outside_the_patched_function_is_noticed(yardstick, monkeypatch):
    unseen = modeling_llama.apply_rotary_pos_emb

    def forward(self, hidden_states, **kwargs):
        return hidden_states, None

    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    with pytest.raises(OracleError, match="rotary"):
        yardstick.run(TOKENS, [0])
    assert modeling_llama.apply_rotary_pos_emb is unseen


def test_a_tied_head_is_the_embedding(yardstick):
    assert torch.equal(
        yardstick.weight("lm_head.weight"), yardstick.weight("model.embed_tokens.weight")
    )


def test_an_untied_head_is_its_own():
    untied = Reference(resolve("toy-untied"), torch.bfloat16)

    assert not torch.equal(
        untied.weight("lm_head.weight"), untied.weight("model.embed_tokens.weight")
    )


def test_traces_are_joined_row_by_row(yardstick):
    second = yardstick.run(TOKENS, [4])
    traces = [yardstick.run([65], [0]), dict(second)]
    joined = concatenated(traces)

    assert joined["q", 1].shape[0] == 6
    assert torch.equal(joined["q", 1][1:], second["q", 1])
    assert joined["logits", 0].shape[0] == 2
    assert traces == [{}, {}]
