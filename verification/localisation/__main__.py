"""The command `python -m verification.localisation`: every fault at every place of a model.

Knows the command line, the record and how to go on where a run was stopped. Exit status: 0 every
fault was found and named first, 1 not so, 2 the command was wrong, 130 interrupted.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console

from engine.bindings import Library
from engine.model_runner import ModelRunner
from engine.models import resolve
from engine.sources import toy
from verification import evidence
from verification.__main__ import parse_layers
from verification.interrupts import ends_in_one_line
from verification.json_lines import append_line, read_lines
from verification.localisation import whole_suite
from verification.localisation.sweep import Planted, Sweep, room
from verification.oracle import Reference

MODELS = ("smollm2-135m", *toy.CONFIGS)
TOKEN_IDS = tuple((37 * i * i + 11 * i + 5) % 250 for i in range(8))
LOGIT_ROWS = (6, 7)


@ends_in_one_line("what was planted so far is kept, and the same command goes on from there")
def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The whole command."""
    parser = argparse.ArgumentParser(
        prog="python -m verification.localisation",
        description="Plants a fault at every operator of every layer; each must be named first.",
    )
    parser.add_argument("--model", default=MODELS[0], choices=MODELS, help="default: %(default)s")
    parser.add_argument(
        "--free-layers", type=parse_layers, help="layers that run free too; all if not given"
    )
    parser.add_argument("--state", type=Path, default=Path("build"), help="where a run goes on")
    parser.add_argument(
        "--evidence", type=Path, default=evidence.EVIDENCE, help="where the record is written"
    )
    options = parser.parse_args(arguments)
    console = console or Console()
    transformers.utils.logging.disable_progress_bar()
    clock, stamp = time.monotonic(), evidence.suite_sha256()[:12]
    state = options.state / f"localisation-{options.model}-{stamp}.jsonl"
    found = read_lines(state)
    seconds = sum(each["seconds"] for each in found)
    with torch.inference_mode():
        done = {(tuple(each["place"]), each["is_whole"]) for each in found}
        for place, is_whole, planted in _all(options.model, done, options.free_layers):
            took, clock = time.monotonic() - clock, time.monotonic()
            faults = [asdict(each) for each in planted]
            each = {"place": place, "is_whole": is_whole, "faults": faults, "seconds": took}
            append_line(state, each)
            found.append(each)
            seconds += took
            misnamed = [each for each in planted if not each.is_named]
            console.print(f"{place[0]}, layer {place[1]}: {len(planted)} faults", misnamed or "")
    planted = [_planted(fault) for each in found for fault in each["faults"]]
    record = _record(options.model, planted, seconds)
    console.print(evidence.write(record, options.evidence))
    return 0 if record.passed else 1


def _planted(content: dict) -> Planted:
    place, local, free = (
        None if content[key] is None else tuple(content[key]) for key in ("place", "local", "free")
    )
    return Planted(content["fault"], place, local, free, content["was_free"])


def _all(
    model: str, done: set, free_layers: Sequence[int] | None
) -> Iterator[tuple[tuple[str, int], bool, list[Planted]]]:
    directory, library = resolve(model), Library()
    with closing(ModelRunner(directory, room(len(TOKEN_IDS)), library)) as runner:
        sweep = Sweep(runner, Reference(directory, torch.bfloat16), TOKEN_IDS, LOGIT_ROWS)
        wrong = sweep.right_engine_fails()
        if wrong:
            raise SystemExit(f"the engine without a fault fails: {wrong[0]}")
        for place in sweep.places():
            if (place, False) not in done:
                is_free = free_layers is None or place[1] in free_layers
                yield place, False, list(sweep.plant(place, is_free))
    if model in toy.CONFIGS:
        for place in whole_suite.places(model):
            if (place, True) not in done:
                yield place, True, list(whole_suite.plant(model, library, [place]))


def _record(model: str, planted: list[Planted], seconds: float) -> evidence.Evidence:
    total = len(planted)
    is_found = sum(each.local is not None or each.free is not None for each in planted)
    by_fault: dict[str, list[Planted]] = defaultdict(list)
    for each in planted:
        by_fault[each.fault].append(each)
    rows = [
        (
            fault,
            len(each),
            sum(p.local == p.expected for p in each),
            sum(p.was_free for p in each),
            sum(p.free == p.expected for p in each),
        )
        for fault, each in by_fault.items()
    ]
    misses = [(p.fault, *p.place, str(p.local), str(p.free)) for p in planted if not p.is_named]
    return evidence.evidence(
        f"localisation-{model}",
        f"Localisation: {model}",
        "One fault in the result of one operator, at every operator of every layer: is it found, "
        "and is that operator, tap and layer the first that the suite names? Once with every "
        "operator fed transformers' values, once running free, the damaged value going on through "
        "the real engine.",
        f"make localise MODEL={model}",
        (
            evidence.Score("faults found", is_found, total, at_least=1.0),
            evidence.Score(
                "named first with known inputs",
                sum(p.local == p.expected for p in planted),
                total,
                at_least=1.0,
            ),
            evidence.Score(
                "named first running free",
                sum(p.free == p.expected for p in planted),
                sum(p.was_free for p in planted),
                at_least=1.0,
            ),
        ),
        (
            evidence.Table(
                "By fault",
                ("fault", "planted", "named first", "planted running free", "named first"),
                tuple(rows),
                note=f"One prompt of {len(TOKEN_IDS)} tokens, prefill; the whole suite, where it "
                "was asked too, adds decode, logits and tokens.",
            ),
            evidence.Table(
                "Not named first", ("fault", "tap", "layer", "known inputs", "free"), tuple(misses)
            ),
        ),
        seconds,
    )


if __name__ == "__main__":
    sys.exit(main())
