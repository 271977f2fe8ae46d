import math

import numpy as np
import pytest
import torch

from engine.config import ModelConfig
from engine.models import resolve
from tests.verification.fake_engine import FakeEngine
from verification.harness import (
    EngineUnderTest,
    Options,
    Subject,
    plan_groups,
    room_for,
    verify_engine,
)
from verification.oracle import Reference
from verification.results import Results
from verification.rounding import to_bf16
from verification.selection import Selection

# One token; a few; while the third decodes, the edge of a block and of an attention tile is
# crossed.
TILE = 128
PROMPTS = (
    ("one", [65]),
    ("few", [72, 101, 108, 108, 111, 44, 32, 119]),
    ("edge", [(7 * i * i + 3 * i) % 256 for i in range(TILE + 3)]),
)
OPTIONS = Options(decode_tokens=5, continuation_tokens=3)


@pytest.fixture(scope="module")
def subject() -> Subject:
    directory = resolve("toy")
    return Subject(
        "toy",
        "0" * 64,
        Reference(directory, torch.bfloat16),
        Reference(directory, torch.float32),
    )


def verified(
    subject: Subject, engine_class: type[FakeEngine], options: Options = OPTIONS
) -> Results:
    directory = resolve("toy")
    groups = plan_groups(PROMPTS, ModelConfig.from_directory(directory), options)
    engine = engine_class(directory, room_for(groups, options))
    under_test = EngineUnderTest(engine, engine.rope_table, "fake", "0" * 64)
    return verify_engine(under_test, subject, groups, options)


def test_a_right_engine_passes_every_check(subject):
    results = verified(subject, FakeEngine)

    assert results.first_failure is None
    assert results.verdict == "pass"
    assert {row.status for row in results.summary} == {"pass"}
    num_taps = 3 + 15 * 2
    prefill = [c for c in results.cells if (c.mode, c.phase) == ("local", "prefill")]
    assert len(prefill) == (num_taps + 2 + 1) * len(
        PROMPTS
    )  # taps, cache writes of 2 layers, argmax
    assert [t.status for p in results.tokens for t in p.tokens].count("fail") == 0


# Faults: each is one operation done wrong, and what must be named for it.


class AdjacentPairs(FakeEngine):
    def rotary_embedding(self, x, positions):
        cos, sin = (t[:, None, :].float() for t in self.cos_sin(positions))
        heads = x.view(len(x), -1, self.config.head_dim).float()
        a, b = heads[..., 0::2], heads[..., 1::2]
        pair = (a * cos - b * sin, b * cos + a * sin)
        return to_bf16(torch.stack(pair, -1).flatten(-2)).reshape(x.shape)


class RopePositionPlusOne(FakeEngine):
    def rotary_embedding(self, x, positions):
        return super().rotary_embedding(x, positions + 1)


class RopeInFloat32(FakeEngine):
    def cos_sin(self, positions):
        angle = positions.float()[:, None] * torch.from_numpy(self.inverse_frequencies())
        return angle.cos(), angle.sin()

    def rope_table(self, num_positions):
        return FakeEngine.rope_table(_Rounded(self), num_positions)


class _Rounded:
    """The table as it would be if only the rotation forgot to round."""

    def __init__(self, engine: FakeEngine) -> None:
        self._engine = engine

    def cos_sin(self, positions):
        return FakeEngine.cos_sin(self._engine, positions)


class NoLlama3Scaling(FakeEngine):
    def inverse_frequencies(self):
        exponent = np.arange(0, self.config.head_dim, 2, dtype=np.float32) / self.config.head_dim
        return (1 / np.power(self.config.rope_theta, exponent)).astype(np.float32)


class AnglesInBfloat16(FakeEngine):
    def inverse_frequencies(self):
        exact = torch.from_numpy(super().inverse_frequencies())
        return exact.bfloat16().float().numpy()


class EpsOutsideTheRoot(FakeEngine):
    def rms_norm(self, x, weight):
        wide = x.double()
        root = wide.square().mean(-1, keepdim=True).sqrt() + self.config.rms_norm_eps
        return to_bf16(to_bf16(wide / root).float() * weight.float())


class MeanOverOneLess(FakeEngine):
    def rms_norm(self, x, weight):
        n = x.shape[-1]
        wide = x.double()
        mean = wide.square().sum(-1, keepdim=True) / (n - 1)
        inner = to_bf16(wide / (mean + self.config.rms_norm_eps).sqrt())
        return to_bf16(inner.float() * weight.float())


class NormRoundedOnce(FakeEngine):
    def rms_norm(self, x, weight):
        wide = x.double()
        mean = wide.square().mean(-1, keepdim=True)
        return to_bf16(wide / (mean + self.config.rms_norm_eps).sqrt() * weight.double())


class HeadsDealtInTurn(FakeEngine):
    def kv_head(self, head):
        return head % self.config.num_kv_heads


class SeesTheNextToken(FakeEngine):
    def num_keys(self, position):
        return position + 1 if self.is_decode else position + 2


class MissesItself(FakeEngine):
    def num_keys(self, position):
        return max(position, 1)


class MissesTheFirstKey(FakeEngine):
    def slots_of(self, table, num_keys):
        slots = super().slots_of(table, num_keys)
        return slots[1:] if num_keys > 1 else slots


class MissesTheNewestKeyInDecode(FakeEngine):
    def num_keys(self, position):
        return position if self.is_decode else position + 1


class OneSlotTooMany(FakeEngine):
    def slots_of(self, table, num_keys):
        slots = super().slots_of(table, num_keys)
        return torch.cat((slots, slots[-1:] ^ 1)) if self.is_decode else slots


class ScaleFivePercentOff(FakeEngine):
    def scale(self):
        return super().scale() * 1.05


class NoScale(FakeEngine):
    def scale(self):
        return math.log2(math.e)


class IgnoresTheBlockTable(FakeEngine):
    def slots_of(self, table, num_keys):
        return torch.arange(num_keys)


class Truncates(FakeEngine):
    def linear(self, tap, layer, x):
        wide = (x.double() @ self.weight(tap, layer).double().T).float()
        return (wide.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


class AccumulatesInBfloat16(FakeEngine):
    def linear(self, tap, layer, x):
        total = torch.zeros(len(x), len(self.weight(tap, layer)))
        for k in range(0, x.shape[1], 16):
            part = x[:, k : k + 16].float() @ self.weight(tap, layer)[:, k : k + 16].float().T
            total = to_bf16(total + part).float()
        return to_bf16(total)


class DropsTheTail(FakeEngine):
    def linear(self, tap, layer, x):
        x = x.clone()
        x[:, -8:] = 0
        return super().linear(tap, layer, x)


class DeadColumn(FakeEngine):
    def linear(self, tap, layer, x):
        out = super().linear(tap, layer, x)
        if (tap, layer) == ("down", 1):
            out[:, 77] = 0
        return out


class SwapsGateAndUp(FakeEngine):
    def silu_and_mul(self, gate, up):
        return super().silu_and_mul(up, gate)


class BiasedExponential(FakeEngine):
    def silu_and_mul(self, gate, up):
        wide = gate.double()
        silu = wide / (1 + (-wide).exp() * 1.004)
        return to_bf16(to_bf16(silu).float() * up.float())


class SiluNotRounded(FakeEngine):
    def silu_and_mul(self, gate, up):
        wide = gate.double()
        return to_bf16(wide * torch.sigmoid(wide) * up.double())


class NoResidual(FakeEngine):
    def residual_add(self, x, y):
        return y


class TruncatedResidual(FakeEngine):
    def residual_add(self, x, y):
        total = x.float() + y.float()
        return (total.view(torch.int32) & -65536).view(torch.float32).to(torch.bfloat16)


class WrongSlotOnTheSecondBlock(FakeEngine):
    def write_kv_cache(self, layer, slots, k, v):
        if layer == 1:
            slots = slots ^ 1
        super().write_kv_cache(layer, slots, k, v)


class ValuesCachedInEightBits(FakeEngine):
    def write_kv_cache(self, layer, slots, k, v):
        super().write_kv_cache(layer, slots, k, v.to(torch.float8_e4m3fn).to(torch.bfloat16))


class WritesBesideTheTable(FakeEngine):
    def write_kv_cache(self, layer, slots, k, v):
        super().write_kv_cache(layer, slots, k, v)
        poisoned = self.k_cache[layer, :, 0, 0].isnan().nonzero()[:, 0]
        self.k_cache[layer, poisoned] = 0


class NextRowOfTheTable(FakeEngine):
    def embedding(self, ids):
        return super().embedding(ids + 1)


class RoundedLogits(FakeEngine):
    def logits(self, x):
        return to_bf16(super().logits(x)).float()


class SecondBest(FakeEngine):
    def argmax(self, logits):
        return logits.topk(2, -1).indices[:, 1].numpy().astype(np.int32)


class LayerZerosNormInLayerOne(FakeEngine):
    def weight(self, tap, layer):
        return super().weight(tap, 0 if tap == "mlp_norm" else layer)


class FinalNormSkipsTheWeight(FakeEngine):
    def weight(self, tap, layer):
        weight = super().weight(tap, layer)
        return torch.ones_like(weight) if tap == "final_norm" else weight


FAULTS = [
    (NoLlama3Scaling, "rope_table", "rope_table", 0, "local"),
    (AnglesInBfloat16, "rope_table", "rope_table", 0, "local"),
    (NextRowOfTheTable, "embedding", "embed", 0, "local"),
    (EpsOutsideTheRoot, "rms_norm", "attn_norm", 0, "local"),
    (MeanOverOneLess, "rms_norm", "attn_norm", 0, "local"),
    (NormRoundedOnce, "rms_norm", "attn_norm", 0, "local"),
    (LayerZerosNormInLayerOne, "rms_norm", "mlp_norm", 1, "local"),
    (FinalNormSkipsTheWeight, "rms_norm", "final_norm", 0, "local"),
    (Truncates, "linear", "q", 0, "local"),
    (AccumulatesInBfloat16, "linear", "q", 0, "local"),
    (DropsTheTail, "linear", "q", 0, "local"),
    (DeadColumn, "linear", "down", 1, "local"),
    (AdjacentPairs, "rotary_embedding", "q_rope", 0, "local"),
    (RopePositionPlusOne, "rotary_embedding", "q_rope", 0, "local"),
    (RopeInFloat32, "rotary_embedding", "q_rope", 0, "local"),
    (WrongSlotOnTheSecondBlock, "write_kv_cache", "write_kv_cache", 1, "local"),
    (ValuesCachedInEightBits, "write_kv_cache", "write_kv_cache", 0, "local"),
    (WritesBesideTheTable, "write_kv_cache", "write_kv_cache", 0, "local"),
    (HeadsDealtInTurn, "attention", "attn", 0, "local"),
    (SeesTheNextToken, "attention", "attn", 0, "local"),
    (MissesItself, "attention", "attn", 0, "local"),
    (MissesTheFirstKey, "attention", "attn", 0, "local"),
    (MissesTheNewestKeyInDecode, "attention", "attn", 0, "local"),
    (OneSlotTooMany, "attention", "attn", 0, "local"),
    (ScaleFivePercentOff, "attention", "attn", 0, "local"),
    (NoScale, "attention", "attn", 0, "local"),
    (IgnoresTheBlockTable, "attention", "attn", 0, "local"),
    (NoResidual, "residual_add", "attn_residual", 0, "local"),
    (TruncatedResidual, "residual_add", "attn_residual", 0, "local"),
    (SwapsGateAndUp, "silu_and_mul", "act", 0, "local"),
    (BiasedExponential, "silu_and_mul", "act", 0, "local"),
    (SiluNotRounded, "silu_and_mul", "act", 0, "local"),
    (RoundedLogits, "linear_f32", "logits", 0, "local"),
    (SecondBest, "argmax", "argmax", 0, "local"),
]


@pytest.mark.parametrize(
    ("fault", "operator", "tap", "layer", "mode"), FAULTS, ids=[f[0].__name__ for f in FAULTS]
)
def test_a_planted_fault_fails_and_is_named_first(subject, fault, operator, tap, layer, mode):
    results = verified(subject, fault)

    failure = results.first_failure
    assert results.verdict == "fail"
    assert (failure.operator, failure.tap, failure.layer, failure.mode) == (
        operator,
        tap,
        layer,
        mode,
    ), failure.message


class DecodesAnotherMask(FakeEngine):
    def attention(self, q, layer, position, table):
        if self.is_decode and position == TILE:  # the first token of the second tile
            return super().attention(q, layer, position - 1, table)
        return super().attention(q, layer, position, table)


def test_a_fault_in_decode_alone_is_placed_there(subject):
    failure = verified(subject, DecodesAnotherMask).first_failure

    assert (failure.operator, failure.phase, failure.prompt) == ("attention", "decode", "edge")
    assert failure.token == TILE
    assert failure.c_function == "twin_attention"
    assert failure.file == "csrc/twin/attention.c"
    assert failure.hf_module == "model.layers.0.self_attn"


class OneUlpInDecode(FakeEngine):
    def linear(self, tap, layer, x):
        out = super().linear(tap, layer, x)
        if self.is_decode and (tap, layer) == ("v", 1):
            wide = x.double() @ self.weight(tap, layer).double().T
            away = torch.where(out.double() < wide, 1, -1).to(torch.int16)  # the other neighbour
            near_tie = ((wide - out.double()).abs() / wide.abs()) > 2.0**-9 * 0.985
            bits = out.view(torch.int16) + away * torch.where(out > 0, 1, -1).to(torch.int16)
            out = torch.where(near_tie, bits.view(torch.bfloat16), out)
        return out


def test_other_bits_in_decode_fail_even_within_the_budget(subject):
    results = verified(subject, OneUlpInDecode)

    cells = [c for c in results.cells if (c.mode, c.phase, c.tap) == ("local", "decode", "v")]
    failed = [c for c in cells if c.status == "fail"]
    assert failed and {c.grade for c in failed} == {"bits"}
    assert results.first_failure.tap == "v"


class WrongOnlyWhenFree(FakeEngine):
    def rms_norm(self, x, weight):
        return super().rms_norm(x, weight if self.is_forced else torch.ones_like(weight))


def test_a_fault_that_known_inputs_hide_is_found_running_free(subject):
    failure = verified(subject, WrongOnlyWhenFree).first_failure

    assert (failure.mode, failure.operator, failure.tap) == ("accumulated", "rms_norm", "attn_norm")


class GivesNan(FakeEngine):
    def silu_and_mul(self, gate, up):
        out = super().silu_and_mul(gate, up)
        out[-1, 5] = math.nan
        return out


def test_a_nan_fails_and_is_shown(subject):
    failure = verified(subject, GivesNan).first_failure

    assert failure.tap == "act"
    assert math.isnan(failure.got)
    assert failure.channel == 5


def test_a_result_becomes_json_without_nan_and_with_every_field(subject):
    import json

    fields = verified(subject, GivesNan).to_json()

    json.dumps(fields, allow_nan=False)
    assert fields["schema"] == 1
    assert fields["first_failure"]["got"] is None
    assert set(fields["cells"][0]) == {
        *("mode", "phase", "prompt", "layer", "tap", "grade"),
        *("status", "ratio", "differing", "values", "z", "max_ulp"),
    }


def test_a_selection_grades_nothing_else(subject):
    only = Selection(taps=frozenset({"attn"}), layers=frozenset({1}))
    results = verified(subject, FakeEngine, Options(decode_tokens=5, selection=only))

    assert {(c.tap, c.layer) for c in results.cells} == {("attn", 1)}
    assert results.tokens == ()
    assert results.verdict == "pass"


def test_a_selection_that_grades_nothing_is_no_pass(subject):
    nothing = Selection(taps=frozenset({"embed"}), layers=frozenset({1}))
    results = verified(subject, FakeEngine, Options(selection=nothing))

    assert results.cells == ()
    assert results.verdict == "fail"


def test_a_fault_outside_the_selection_is_not_reported(subject):
    only = Selection(taps=frozenset({"embed"}))
    results = verified(subject, NoResidual, Options(selection=only))

    assert results.verdict == "pass"


def test_an_engine_that_hides_its_table_is_said_not_to_have_been_run(subject):
    directory = resolve("toy")
    groups = plan_groups(PROMPTS[:2], ModelConfig.from_directory(directory), OPTIONS)
    engine = FakeEngine(directory, room_for(groups, OPTIONS))
    results = verify_engine(EngineUnderTest(engine, None, "", ""), subject, groups, OPTIONS)

    row = next(row for row in results.summary if row.tap == "rope_table")
    assert (row.status, row.values) == ("not run", 0)
    assert row.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "toy-untied", "toy-gqa3", "toy-plain-rope", "toy-wide"])
def test_the_engine_passes_on_the_toys(name, library):
    from verification.harness import verify

    prompts = [("short", [65, 66]), ("block", [(11 * i * i + i) % 256 for i in range(140)])]
    results = verify(resolve(name), prompts, OPTIONS, name=name, library=library)

    assert results.first_failure is None
    assert results.verdict == "pass"
