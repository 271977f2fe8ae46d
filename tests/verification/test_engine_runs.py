import numpy as np
import pytest
import torch

from engine.models import resolve
from tests.verification.fake_engine import FakeEngine
from verification.engine_runs import (
    MAX_LOGIT_ROWS,
    POISON,
    GroupRun,
    blocks_needed,
    group_prompt,
)
from verification.harness import Options, room_for
from verification.oracle import Reference, concatenated
from verification.taps import all_keys

BLOCK_SIZE = 16
LENGTHS = (1, 2, 7, BLOCK_SIZE, BLOCK_SIZE + 1, 2 * BLOCK_SIZE + 9)
DECODE = 8


@pytest.fixture(scope="module")
def prompts():
    return [
        group_prompt(str(n), [(5 * i * i + n) % 256 for i in range(n)], DECODE) for n in LENGTHS
    ]


@pytest.fixture(scope="module")
def free_run(prompts):
    engine = FakeEngine(resolve("toy"), room_for([prompts], Options(block_size=BLOCK_SIZE)))
    num_blocks = blocks_needed(prompts, 16, BLOCK_SIZE)
    run = GroupRun(engine, prompts, num_blocks, 16)
    return engine, run, run.run(None)


def test_logit_rows_are_all_or_the_ends_and_some_between():
    short, long = group_prompt("s", [0] * 20, 8), group_prompt("l", [0] * 1000, 8)

    assert short.logit_rows == tuple(range(20))
    assert len(long.logit_rows) <= MAX_LOGIT_ROWS
    assert long.logit_rows[0] == 0
    assert long.logit_rows[-8:] == tuple(range(992, 1000))


def test_a_prompt_of_one_token_is_not_decoded(prompts, free_run):
    assert prompts[0].num_decode == 0
    decode = free_run[2].passes[1]

    assert "1" not in [segment.prompt for segment in decode.segments]


def test_decode_is_the_last_tokens_of_each_prompt_in_order(prompts, free_run):
    prefill, decode = free_run[2].passes
    for segment in decode.segments:
        prompt = next(p for p in prompts if p.id == segment.prompt)
        expected = list(range(prompt.num_tokens - prompt.num_decode, prompt.num_tokens))
        assert decode.positions[segment.rows].tolist() == expected
        assert decode.token_ids[segment.rows].tolist() == [prompt.token_ids[i] for i in expected]
        assert segment.first_position == expected[0]
    assert len(prefill.positions) == sum(LENGTHS)


def test_decode_and_prefill_rows_are_matched(free_run):
    prefill, decode = free_run[2].passes
    for key in all_keys(2):
        assert torch.equal(decode.outputs[key], decode.twin[key]), key


def test_keys_reach_to_the_last_token_of_a_segment(prompts, free_run):
    for each in free_run[2].passes:
        for index, segment in enumerate(each.segments):
            prompt = next(p for p in prompts if p.id == segment.prompt)
            k, v = each.keys(1, index)
            assert len(k) == len(v) == prompt.num_tokens
            own = each.outputs["k_rope", 1][segment.rows]
            first = segment.first_position
            assert torch.equal(k[first : first + len(own)], own)


def test_no_table_is_the_identity_and_no_block_has_two_owners(prompts, free_run):
    tables = free_run[2].tables
    blocks = [block for table in tables for block in table]

    assert len(set(blocks)) == len(blocks)
    assert any(table != tuple(sorted(table)) for table in tables if len(table) > 1)


def test_spare_memory_keeps_its_poison(free_run):
    engine, run, mode = free_run

    assert mode.spoiled is None
    slot = run._spare[0] * BLOCK_SIZE + 3
    k, v = engine.read_kv(0, np.array([slot], np.int32))
    assert (k == POISON).all() and (v == POISON).all()


def test_spoiled_spare_memory_is_noticed(prompts):
    class Spoils(FakeEngine):
        def write_kv_cache(self, layer, slots, k, v):
            super().write_kv_cache(layer, slots, k, v)
            if layer == 1:
                self.v_cache[layer, self.k_cache[layer, :, 0, 0].isnan()] = 1.0

    engine = Spoils(resolve("toy"), room_for([prompts], Options(block_size=BLOCK_SIZE)))
    mode = GroupRun(engine, prompts, blocks_needed(prompts, 16, BLOCK_SIZE), 16).run(None)

    assert mode.spoiled is not None and mode.spoiled[0] == 1


def test_forced_taps_reach_the_engine_and_their_outputs_come_back(prompts):
    reference = Reference(resolve("toy"), torch.bfloat16)
    known = concatenated([reference.run(p.token_ids, p.logit_rows) for p in prompts])
    engine = FakeEngine(resolve("toy"), room_for([prompts], Options(block_size=BLOCK_SIZE)))
    prefill, decode = (
        GroupRun(engine, prompts, blocks_needed(prompts, 16, BLOCK_SIZE), 16).run(known).passes
    )

    assert prefill.inputs is known
    assert prefill.mode == decode.mode == "local"
    # With its inputs forced, an exact operation gives transformers' own result in every layer.
    assert torch.equal(prefill.outputs["mlp_residual", 1], known["mlp_residual", 1])
    first = next(s for s in prefill.segments if s.prompt == "7").rows.start
    last = next(s for s in decode.segments if s.prompt == "7").rows
    assert torch.equal(decode.inputs["q", 0][last], known["q", 0][first + 1 : first + 7])


def choices_of_a_prefill(engine, prompt, text) -> list[int]:
    """The engine's choices after a prompt and each token of a text, by one prefill of both."""
    whole = group_prompt("whole", [*prompt.token_ids, *text[:-1]], len(text))
    mode = GroupRun(engine, [whole], blocks_needed([whole], 0, BLOCK_SIZE)).run(None)
    rows = [whole.logit_rows.index(r) for r in range(prompt.num_tokens - 1, whole.num_tokens)]
    return mode.next_ids["prefill"][rows].tolist()


def test_greedy_choices_are_those_of_a_prefill_of_the_same_tokens(prompts):
    engine = FakeEngine(resolve("toy"), room_for([prompts], Options(block_size=BLOCK_SIZE)))
    run = GroupRun(engine, prompts, blocks_needed(prompts, 16, BLOCK_SIZE), 16)
    mode = run.run(None)
    last = mode.next_ids["prefill"][np.cumsum([len(p.logit_rows) for p in prompts]) - 1]
    own = run.decode_on(mode.tables, last, 4)
    led = run.decode_on(mode.tables, last, 4, {2: (9, 8, 7, 6), 4: (1, 2, 3, 4)})

    assert list(own) == list(range(len(prompts))) and list(led) == [2, 4]
    assert own[5] == choices_of_a_prefill(engine, prompts[5], own[5])
    assert led[4] == choices_of_a_prefill(engine, prompts[4], (1, 2, 3, 4))
    assert led[2][0] == own[2][0]
