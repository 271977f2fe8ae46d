import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from engine.config import ModelConfig
from engine.models import resolve
from engine.sources.toy import CONFIGS
from tests.verification.fake_engine import TILE, FakeEngine
from verification.engine_runs import GroupPrompt
from verification.harness import (
    EngineUnderTest,
    Options,
    Subject,
    plan_groups,
    room_for,
    verify_engine,
)
from verification.oracle import Reference
from verification.probes import KEY_BASE, probe_group, probe_trace
from verification.results import Results
from verification.rounding import to_bf16
from verification.taps import all_keys

OPTIONS = Options(decode_tokens=2, continuation_tokens=1)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """On tensors this small, torch's threads wait for each other more than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def subject() -> Subject:
    directory = resolve("toy")
    models = (Reference(directory, torch.bfloat16), Reference(directory, torch.float32))
    return Subject("toy", "0" * 64, *models)


def probed(subject: Subject, engine_class: type[FakeEngine]) -> Results:
    directory = resolve("toy")
    config = ModelConfig.from_directory(directory)
    groups = plan_groups([("one", [65])], config, OPTIONS)
    probes = probe_group(config, OPTIONS.decode_tokens)
    engine = engine_class(directory, room_for([*groups, probes], OPTIONS))
    under_test = EngineUnderTest(engine, engine.rope_table, "fake", "0" * 64)
    return verify_engine(under_test, subject, groups, OPTIONS, probes=probes)


def place(results: Results) -> tuple[str, str, int]:
    failure = results.first_failure
    assert failure is not None and (failure.prompt or "probe").startswith("probe")
    return (failure.operator, failure.tap, failure.layer)


@pytest.mark.parametrize("vocab_size", [100, 260, 320, 49152])
def test_ids_reach_both_ends_of_the_vocabulary_and_no_further(vocab_size: int):
    group = probe_group(
        replace(CONFIGS["toy"], vocab_size=vocab_size, eos_token_ids=(), bos_token_id=None), 8
    )

    ids = {token for prompt in group for token in prompt.token_ids}

    assert (min(ids), max(ids)) == (0, vocab_size - 1)


def test_a_right_engine_passes_the_probes(subject):
    results = probed(subject, FakeEngine)

    assert results.first_failure is None
    assert results.passed
    assert {cell.prompt for cell in results.cells} >= {"probe-1", "probe-129", "probe-260"}


class NoEpsInLayer1(FakeEngine):
    """Seen by small rows alone: layer 1's real ones are large."""

    def rms_norm(self, x, weight):
        if weight is not self.weight("mlp_norm", 1):
            return super().rms_norm(x, weight)
        wide = x.double()
        inner = to_bf16(wide / wide.square().mean(-1, keepdim=True).sqrt())
        return to_bf16(inner.float() * weight.float())


class LastOfATie(FakeEngine):
    def argmax(self, logits):
        best = logits.flip(-1).numpy().argmax(-1)
        return (logits.shape[-1] - 1 - best).astype("int32")


class MaximumStartsAtZero(FakeEngine):
    """Right for every score near zero; far below it the sum of float32 powers is empty."""

    def attention(self, q, layer, position, table):
        slots = self.slots_of(table, position + 1)
        heads = [self.kv_head(head) for head in range(self.config.num_heads)]
        k = self.k_cache[layer, slots][:, heads].float()
        scores = torch.einsum("hd,khd->hk", q.float(), k) * self.scale()
        out = super().attention(q, layer, position, table)
        powers = (scores - scores.amax(-1, keepdim=True).clamp_min(0)).exp2()
        return torch.where(powers.sum(-1, keepdim=True) > 0, out, math.nan)


class NewestTileSkipped(FakeEngine):
    def num_keys(self, position):
        return position if position and position % TILE == 0 else position + 1


@pytest.mark.parametrize(
    ("engine_class", "expected"),
    [
        (NoEpsInLayer1, ("rms_norm", "mlp_norm", 1)),
        (LastOfATie, ("argmax", "argmax", 0)),
        (MaximumStartsAtZero, ("attention", "attn", 0)),
        (NewestTileSkipped, ("attention", "attn", 0)),
    ],
)
def test_a_fault_that_real_values_hide_is_named_by_a_probe(subject, engine_class, expected):
    assert place(probed(subject, engine_class)) == expected


def test_a_probe_has_a_value_for_every_tap_but_the_logits():
    config = ModelConfig.from_directory(resolve("toy-gqa8"))
    group = probe_group(config, 2)

    trace = probe_trace(config, group)

    assert set(trace) == set(all_keys(config.num_layers)) - {("logits", 0)}
    rows = sum(prompt.num_tokens for prompt in group)
    assert trace["q_rope", 1].shape == (rows, config.num_heads * config.head_dim)
    assert trace["k_rope", 1].shape == (rows, config.num_kv_heads * config.head_dim)
    assert all(value.isfinite().all() for value in trace.values())


def test_probes_have_a_zero_query_and_scores_far_below_zero():
    config = ModelConfig.from_directory(resolve("toy"))
    prompt = GroupPrompt("probe", tuple(range(40)), tuple(range(40)), 0)

    trace = probe_trace(config, [prompt])
    q = trace["q_rope", 0].view(40, config.num_heads, -1).double()
    k = trace["k_rope", 0].view(40, config.num_kv_heads, -1).double()

    assert (q == 0).all(-1).any()
    scores = torch.einsum("qd,kd->qk", q[:, 0], k[:, 0]) / math.sqrt(config.head_dim)
    assert float(scores.amax(-1).min()) < -100 * KEY_BASE / math.sqrt(config.head_dim) + 5
