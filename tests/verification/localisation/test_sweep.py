"""Every fault at every place of a toy is named first; a sweep that could not fail would be none."""

import json
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
import torch

from engine.model_runner import ModelRunner
from engine.models import resolve
from verification.evidence import read
from verification.localisation import __main__ as command
from verification.localisation import whole_suite
from verification.localisation.faults import faults_at, faults_of_values
from verification.localisation.sweep import Sweep, room
from verification.oracle import Reference
from verification.taps import POINT

IDS = command.TOKEN_IDS


@pytest.fixture(scope="module")
def sweep(library) -> Iterator[Sweep]:
    directory = resolve("toy")
    with closing(ModelRunner(directory, room(len(IDS)), library)) as runner:
        yield Sweep(runner, Reference(directory, torch.bfloat16), IDS, command.LOGIT_ROWS)


def test_the_right_engine_fails_nothing(sweep):
    assert sweep.right_engine_fails() == []


def test_every_fault_at_every_place_is_named_first_in_both_modes(sweep):
    planted = [fault for place in sweep.places() for fault in sweep.plant(place)]

    assert [fault for fault in planted if not fault.is_named] == []
    assert {fault.place for fault in planted} == set(sweep.places())
    assert {fault.fault for fault in planted} == {*faults_at("attn")}
    assert len(planted) == 2 * (14 * 5 + 6 + 1) + 3 * 5


def test_a_fault_that_changes_nothing_is_not_found(sweep, monkeypatch):
    monkeypatch.setattr(
        "verification.localisation.sweep.faults_at",
        lambda tap: {"nothing": lambda clean, place: clean},
    )

    for place in (("attn", 1), ("embed", 0), ("logits", 0)):
        (planted,) = sweep.plant(place)
        assert (planted.local, planted.free, planted.is_named) == (None, None, False)


def test_a_fault_somewhere_else_is_not_counted_as_named(sweep):
    (*_, planted) = sweep.plant(("gate", 1))
    elsewhere = planted.__class__(planted.fault, ("up", 1), planted.local, planted.free)

    assert planted.is_named
    assert not elsewhere.is_named


@pytest.mark.parametrize("tap", POINT)
def test_every_fault_changes_the_values(sweep, tap):
    place = (tap, 0)
    for mode in ("local", "accumulated"):
        clean = (sweep._local if mode == "local" else sweep._free)[place]
        for name, damage in faults_at(tap).items():
            before = clean.clone()
            damaged = damage(clean.clone(), sweep._place(mode, place))
            assert not torch.equal(damaged.float().nan_to_num(), clean.float()), name
            assert damaged.dtype == clean.dtype and damaged.shape == clean.shape
            assert torch.equal(before, clean)


# Two places of each half of the layer, drawn by a seed; `make localise MODEL=toy` asks them all.
SAMPLE = [
    whole_suite.places("toy")[i] for i in np.random.default_rng(5).choice(33, 5, replace=False)
]


@pytest.mark.parametrize("key", SAMPLE, ids=lambda key: f"{key[0]}-{key[1]}")
def test_the_whole_suite_names_it_first_too(library, key):
    planted = list(whole_suite.plant("toy", library, [key]))

    assert [fault for fault in planted if not fault.is_named] == []
    assert len(planted) == len(faults_of_values())


def test_the_command_goes_on_where_it_was_stopped_and_writes_a_record(tmp_path, monkeypatch):
    everything = list
    monkeypatch.setattr(Sweep, "places", lambda self: everything([("q", 0), ("attn", 1)]))
    monkeypatch.setattr(whole_suite, "places", lambda name: [])
    arguments = ["--model", "toy", "--state", str(tmp_path), "--evidence", str(tmp_path)]

    assert command.main(arguments) == 0
    (state,) = tmp_path.glob("*.jsonl")
    lines = state.read_text().splitlines()
    state.write_text(lines[0] + "\n" + lines[1][:-1])  # stopped while it wrote the second
    assert command.main(arguments) == 0

    again = state.read_text().splitlines()
    assert [json.loads(line)["place"] for line in again] == [["q", 0], ["attn", 1]]
    assert again[0] == lines[0]
    record = read(tmp_path / "localisation-toy.json")
    assert [(s.hits, s.total) for s in record.scores] == [(11, 11)] * 3


def test_a_fault_that_is_not_named_fails_the_record():
    planted = [command.Planted("bit flip", ("q", 0), ("linear", "q", 0), None)]

    record = command._record("toy", planted, 1.0)

    assert not record.passed
    assert record.tables[1].rows == (("bit flip", "q", 0, "('linear', 'q', 0)", "None"),)
