"""Faults, answers and rows of the kill matrix, made up for the tests of verification/teeth."""

from dataclasses import replace

from verification.mutants.catalogue import load_catalogue
from verification.mutants.faults import TestedFault
from verification.teeth import trees
from verification.teeth.arena import KILLED, Answer, Result
from verification.teeth.matrix import Row
from verification.teeth.plan import Planted, from_mutant
from verification.teeth.report import Controls

ONE = Controls(1)
SILU = "csrc/twin/silu_and_mul.c"
TESTED = TestedFault(
    "tested", "engine/batch.py", "a fault", "a", "b", ("tests/engine/test_batch.py", "tests/system")
)


def of_catalogue(**changes: object) -> Planted:
    return replace(from_mutant(load_catalogue()[0]), **changes)


def answer(label: str, status: str = KILLED, named=None, levels=(), by: str = "") -> Answer:
    return Answer(label, status, by, "", named, levels, 0.1)


def row(planted: Planted, *answers: Answer, build: str = trees.OK, equivalent: bool = False) -> Row:
    return Row(planted, Result(planted.id, build, answers), equivalent)
