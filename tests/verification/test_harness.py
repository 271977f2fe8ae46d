import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from engine.config import ModelConfig
from engine.models import resolve
from tests.verification.fake_engine import TILE, FakeEngine
from tests.verification.faulty_engines import FAULTS, NoResidual
from verification.harness import (
    EngineUnderTest,
    Options,
    Subject,
    plan_groups,
    room_for,
    verify_engine,
)
from verification.oracle import Reference
from verification.report_files import json_text
from verification.report_html import render
from verification.report_terminal import print_report
from verification.results import Results
from verification.selection import Selection

# One token; a few; while the third decodes, the edge of a block and of an attention tile is
# crossed.
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
    num_cells = num_taps + 2 + 1  # taps, cache writes of 2 layers, argmax
    assert len(prefill) == num_cells * len(PROMPTS)
    assert [t.status for p in results.tokens for t in p.tokens].count("fail") == 0


@pytest.mark.parametrize(
    ("fault", "operator", "tap", "layer", "told"), FAULTS, ids=[f[0].__name__ for f in FAULTS]
)
def test_a_planted_fault_fails_is_named_first_and_explained(
    subject, fault, operator, tap, layer, told
):
    results = verified(subject, fault)

    failure = results.first_failure
    assert results.verdict == "fail"
    assert (failure.operator, failure.tap, failure.layer, failure.mode) == (
        operator,
        tap,
        layer,
        "local",
    ), failure.message
    if told is None:
        assert failure.diagnosis is None
    else:
        assert failure.diagnosis is not None and told in failure.diagnosis


@pytest.mark.parametrize("operation", ["embedding", "rms_norm", "linear", "attention"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_an_engine_that_gives_no_numbers_has_its_reports(subject, operation: str, value: float):
    class NotFinite(FakeEngine):
        pass

    def wrong(self: FakeEngine, *arguments: object) -> torch.Tensor:
        out = getattr(FakeEngine, operation)(self, *arguments).clone()
        out[-1:] = value
        return out

    setattr(NotFinite, operation, wrong)
    results = verified(subject, NotFinite).to_json()
    results |= {"gpu_record": results["goldens"], "prompts_not_run": []}

    assert results["verdict"] == "fail"
    assert results["first_failure"]["operator"] == operation
    for width in (80, 100):
        print_report(results, Console(file=io.StringIO(), width=width))
    assert render(results) and json_text(results)


def test_tokens_alone_are_a_verdict(subject):
    alone = replace(OPTIONS, selection=Selection(grades=frozenset({"tokens"})))

    right, wrong = verified(subject, FakeEngine, alone), verified(subject, FAULTS[0][0], alone)

    assert right.cells == () and right.verdict == "pass"
    assert {t.status for p in wrong.tokens for t in p.tokens} >= {"fail"}
    assert wrong.verdict == "fail"


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


class GivesNoToken(FakeEngine):
    def argmax(self, logits):
        ids = super().argmax(logits)
        ids[-1:] = -1_041_166_608  # what memory happened to hold
        return ids


def test_an_id_that_is_no_token_fails_at_argmax_and_stops_nothing(subject):
    failure = verified(subject, GivesNoToken).first_failure

    assert (failure.operator, failure.tap) == ("argmax", "argmax")


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
    assert fields["schema"] == 2
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


def test_a_repeated_token_is_no_second_chance_to_differ(library):
    from verification.harness import verify

    # token 108 twice: each of its rows has 6 values of attn_norm on the other side of a rounding,
    # 12 of 5632, where 11 may be if all are independent
    prompts = [("few", [72, 101, 108, 108, 111, 44, 32, 119])]
    results = verify(resolve("toy-wide"), prompts, OPTIONS, name="toy-wide", library=library)

    assert results.first_failure is None
    differing = [c.differing for c in results.cells if c.prompt == "few" and c.tap == "attn_norm"]
    assert 12 in differing


@pytest.mark.slow
@pytest.mark.parametrize("name", ["toy", "toy-untied", "toy-gqa3", "toy-plain-rope", "toy-wide"])
def test_the_engine_passes_on_the_toys(name, library):
    from verification.harness import verify

    prompts = [("short", [65, 66]), ("block", [(11 * i * i + i) % 256 for i in range(140)])]
    results = verify(resolve(name), prompts, OPTIONS, name=name, library=library)

    assert results.first_failure is None
    assert results.verdict == "pass"
