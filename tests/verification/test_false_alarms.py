from dataclasses import replace

import pytest
import torch

from engine.config import ModelConfig
from engine.models import resolve
from verification import false_alarms
from verification.engine_runs import group_prompt
from verification.false_alarms import (
    Kept,
    OtherTransformers,
    Trials,
    alarms_of,
    judge_whole,
    record_of,
)
from verification.harness import verify
from verification.mutants.catalogue import CATALOGUE_PATH, load_catalogue
from verification.oracle import Reference, Trace, concatenated
from verification.plan import Options

PROMPTS = (("few", [72, 101, 108, 108, 111, 44, 32, 119]), ("more", list(range(60, 90))))
OPTIONS = Options(decode_tokens=2, continuation_tokens=2, num_threads=1)


def test_there_are_more_than_eight_legal_builds_and_they_are_of_every_kind_of_sum():
    legal = [mutant for mutant in load_catalogue(CATALOGUE_PATH) if mutant.is_legal]

    assert len(legal) >= 8
    assert {mutant.operator for mutant in legal} >= {"linear", "attention", "rms_norm"}


@pytest.mark.parametrize("block_size", [16, 128])
def test_a_right_engine_raises_no_alarm(library, block_size):
    options = replace(OPTIONS, block_size=block_size)
    results = verify(resolve("toy"), PROMPTS, options, library=library)

    assert alarms_of(results) == {}


def test_a_failed_cell_a_failed_logit_row_and_a_pooled_failure_are_alarms(library):
    results = verify(resolve("toy"), PROMPTS, OPTIONS, library=library)
    cells = list(results.cells)
    index = next(i for i, cell in enumerate(cells) if (cell.prompt, cell.tap) == ("more", "o"))
    cells[index] = replace(cells[index], status="fail")

    alarms = alarms_of(replace(results, cells=tuple(cells), verdict="fail"))
    assert list(alarms) == ["more"] and " o, layer" in alarms["more"]
    logits = (replace(results.logits[0], status="fail"), *results.logits[1:])
    assert alarms_of(replace(results, logits=logits, verdict="fail")) == {"few": "logits"}
    assert list(alarms_of(replace(results, verdict="fail"))) == ["all prompts"]


@pytest.fixture(scope="module")
def traces() -> dict[str, Trace]:
    group = [group_prompt(name, ids, 1) for name, ids in PROMPTS]

    def trace(reference: Reference) -> Trace:
        return concatenated([reference.run(p.token_ids, p.logit_rows) for p in group])

    directory = resolve("toy")
    found = {
        "yardstick": trace(Reference(directory, torch.bfloat16)),
        "oracle": trace(Reference(directory, torch.float32)),
    }
    for other in false_alarms.TRANSFORMERS:
        reference = Reference(directory, other.dtype)
        other.prepare(reference.model)
        with other.around():
            found[other.name] = trace(reference)
    return found


def judged(traces: dict[str, Trace], outputs: Trace) -> Trials:
    logits = outputs["logits", 0].float()
    outputs = {key: value.to(torch.bfloat16) for key, value in outputs.items()}
    outputs["logits", 0] = logits
    group = [group_prompt(name, ids, 1) for name, ids in PROMPTS]
    config = ModelConfig.from_directory(resolve("toy"))
    wholes = (traces["yardstick"], traces["oracle"])
    return judge_whole("other", "toy", config, group, outputs, *wholes)


@pytest.mark.parametrize("other", false_alarms.TRANSFORMERS, ids=lambda other: other.name)
def test_other_transformers_have_other_bits_and_raise_no_alarm(traces, other: OtherTransformers):
    outputs = traces[other.name]

    trials = judged(traces, outputs)

    assert trials.alarms == {}
    assert trials.prompts == ("few", "more")
    is_other = not torch.equal(
        outputs["logits", 0].float(), traces["yardstick"]["logits", 0].float()
    )
    assert is_other


def test_wrong_values_in_the_engines_place_are_alarms(traces):
    wrong = {key: value * 1.3 for key, value in traces["yardstick"].items()}

    assert set(judged(traces, wrong).alarms) >= {"few", "more"}


def test_the_record_counts_and_fails_with_one_alarm():
    quiet = Trials("a", "toy", ("x", "y"), {})

    assert record_of([quiet], 1.0).passed
    record = record_of([quiet, Trials("a", "toy-wide", ("x",), {"x": "o, layer 1"})], 1.0)
    assert not record.passed
    assert (record.scores[0].hits, record.scores[0].total) == (1, 3)
    assert record.tables[0].rows == (("a", "toy, toy-wide", 3, 1),)
    assert record.tables[1].rows == (("a", "toy-wide", "x", "o, layer 1"),)


def test_a_run_that_was_stopped_goes_on_from_what_is_kept(tmp_path, monkeypatch):
    tried = []

    def builds():
        yield "one", None, OPTIONS
        yield "two", None, OPTIONS

    def try_build(name, library, options, model):
        tried.append((name, model))
        if len(tried) == 2:
            raise KeyboardInterrupt
        return Trials(name, model, ("x",), {})

    monkeypatch.setattr(false_alarms, "builds", builds)
    monkeypatch.setattr(false_alarms, "try_build", try_build)
    monkeypatch.setattr(false_alarms, "TRANSFORMERS", ())
    command = ["--models", "toy", "--state", str(tmp_path), "--evidence", str(tmp_path)]

    assert false_alarms.main(command) == 130
    assert false_alarms.main(command) == 0

    assert tried == [("one", "toy"), ("two", "toy"), ("two", "toy")]
    (path,) = tmp_path.glob("*.jsonl")
    assert [each.engine for each in Kept(path).trials] == ["one", "two"]
    path.write_text(path.read_text()[:-5])  # stopped while it wrote
    assert [each.engine for each in Kept(path).trials] == ["one"]
