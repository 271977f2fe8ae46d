"""The command `python -m verification.diagnosis`: how many known faults are told by their name.

Two sources. Every variant of the library, planted as the output of its operation on transformers'
inputs of a toy: it must be named, and of the right output and of damage that is no variant nothing
may be said. And the catalogue's faults in the real C whose variant the library knows:
`known_faults` has the words that must be in the first failure's diagnosis.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from engine.bindings import Library
from engine.config import ModelConfig
from engine.models import resolve
from verification import evidence
from verification.diagnosis.known_faults import FAULTS
from verification.diagnosis.library import VARIANTS, diagnosis_of
from verification.diagnosis.scene import Guess, Result, Scene
from verification.engine_runs import group_prompt
from verification.expected import Bounded, LayerTruth, RopeRows, expected_logits
from verification.harness import verify
from verification.mutants.build import workshop
from verification.mutants.catalogue import CATALOGUE_PATH, Mutant, load_catalogue
from verification.mutants.judge import quiet_torch
from verification.oracle import Reference, concatenated
from verification.passes import Pass
from verification.plan import Options
from verification.prompts import prompts_for
from verification.replay import Replayed
from verification.rounding import to_bf16
from verification.truth import LinearTruth
from verification.verify_op.passes import prefill_pass

MODEL = "toy-untied"
LENGTHS = (133, 20)  # more than a tile; another sequence
TAPS = {  # an operation -> a tap and layer that it is tried at
    "embedding": ("embed", 0),
    "rms_norm": ("mlp_norm", 1),
    "linear": ("down", 1),
    "linear_f32": ("logits", 0),
    "rotary_embedding": ("q_rope", 0),
    "attention": ("attn", 1),
    "residual_add": ("mlp_residual", 1),
    "silu_and_mul": ("act", 0),
}
DAMAGE: dict[str, Callable[[Tensor], Tensor]] = {
    "scaled by 1.01": lambda t: t * 1.01,
    "channels rolled": lambda t: t.roll(3, 1),
    "tokens reversed": lambda t: t.flip(0),
    "noise": lambda t: t + t.abs().mean() * torch.randn(t.shape, generator=_seeded()),
}


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


@dataclass(frozen=True)
class Told:
    """One fault, what had to be said of it (None: nothing) and what was."""

    operation: str
    fault: str
    wanted: str | None
    told: str | None

    @property
    def is_right(self) -> bool:
        """Whether the fault was told by its name, or nothing was said where nothing may be."""
        if self.wanted is None:
            return self.told is None
        return self.told is not None and self.wanted in self.told


class Stage:
    """Transformers' own values of a toy, in which an operation's output is replaced."""

    def __init__(self, model: str = MODEL) -> None:
        directory = resolve(model)
        self.config = ModelConfig.from_directory(directory)
        self.reference = Reference(directory, torch.bfloat16)
        texts = [[(7 * i * i + 3 * i + n) % 256 for i in range(n)] for n in LENGTHS]
        group = [group_prompt(str(len(text)), text, 1) for text in texts]
        traces = [self.reference.run(p.token_ids, p.logit_rows) for p in group]
        self.trace = concatenated(traces)
        self.run: Pass = replace(prefill_pass(group, self.trace), outputs=dict(self.trace))

    def scene(self, operation: str) -> Scene:
        """The right run, seen from an operation."""
        table = torch.cat(self.reference.rope_table(range(max(LENGTHS))), 1)
        rope, weight = RopeRows(table, True), self.reference.weight
        return Scene(self.config, *TAPS[operation], self.run, rope, weight)

    def right(self, scene: Scene) -> Replayed | Bounded:
        """What the operation should give."""
        if scene.tap == "logits":
            return expected_logits(LinearTruth([scene.own_weight()]), *scene.inputs())
        truth = LayerTruth(self.reference, self.config, scene.layer, scene.rope)
        return truth.expect(scene.tap, scene.run)

    def of_operation(self, operation: str) -> Iterator[Told]:
        """Every variant, what is right and what is no variant, in the operation's place."""
        scene = self.scene(operation)
        right = self.right(scene)
        dtype = self.trace[scene.tap, scene.layer].dtype
        dtype = torch.float32 if scene.tap == "logits" else dtype
        truth = _values(right, dtype)

        def told(value: Tensor) -> str | None:
            outputs = {**self.run.outputs, (scene.tap, scene.layer): value}
            return diagnosis_of(replace(scene, run=replace(scene.run, outputs=outputs)), right)

        for guess in VARIANTS[operation](scene):
            value = _planted(guess, truth)
            if value is not None:
                yield Told(operation, guess.words, guess.words, told(value))
        yield Told(operation, "nothing: the right output", None, told(truth))
        if scene.tap != "logits":  # transformers' bf16 logits are a known variant
            theirs = self.trace[scene.tap, scene.layer].clone()
            yield Told(operation, "nothing: transformers' output", None, told(theirs))
        for fault, damage in DAMAGE.items():
            yield Told(operation, fault, None, told(damage(truth.float()).to(dtype)))


def _values(result: Result, dtype: torch.dtype) -> Tensor:
    if isinstance(result, Bounded):
        return result.value.float() if dtype == torch.float32 else to_bf16(result.value)
    return (result if isinstance(result, Tensor) else result.value).to(dtype)


def _planted(guess: Guess, truth: Tensor) -> Tensor | None:
    """The guess as an output, right on rows where it is undefined; None if nothing is wrong."""
    value = _values(guess.result, truth.dtype).clone()
    if guess.rows is not None:
        if 2 * int(guess.rows.sum()) < len(guess.rows):
            return None
        value[~guess.rows] = truth[~guess.rows]
    return None if torch.equal(value, truth) else value


def of_catalogue(only: Sequence[str] | None = None) -> Iterator[Told]:
    """What the suite says of the catalogue's faults in the real C."""
    mutants = [m for m in load_catalogue(CATALOGUE_PATH) if m.id in (only or FAULTS)]
    with workshop() as shop:
        for mutant, tree in shop.plant_all(mutants):
            told = _diagnosis(mutant, tree.library())
            yield Told(mutant.operator, mutant.fault, FAULTS[mutant.id], told)


def _diagnosis(mutant: Mutant, library: Library) -> str | None:
    model, selection = mutant.setting
    directory = resolve(model)
    vocab_size = ModelConfig.from_directory(directory).vocab_size
    prompts = [(p.id, p.token_ids) for p in prompts_for(model, directory, vocab_size, selection)]
    results = verify(directory, prompts, Options(num_threads=1), name=model, library=library)
    return results.first_failure and results.first_failure.diagnosis


def record_of(library: Sequence[Told], catalogue: Sequence[Told], seconds: float):
    """The figures."""
    known = [each for each in library if each.wanted is not None]
    silent = [each for each in library if each.wanted is None]
    wrong = [each for each in (*library, *catalogue) if not each.is_right]
    operations = list(dict.fromkeys(each.operation for each in library))

    def count(told: Sequence[Told], operation: str) -> str:
        mine = [each for each in told if each.operation == operation]
        return f"{sum(each.is_right for each in mine)} of {len(mine)}"

    return evidence.evidence(
        "diagnosis",
        "Diagnosis",
        "When an operator fails, known wrong variants are tried on the very same inputs: is what "
        "was done told by its name, and is nothing told where nothing known was done? Variants are "
        f"planted as outputs on a toy ({MODEL}); faults of the catalogue, in the real C.",
        "python -m verification.diagnosis",
        (
            evidence.Score("variants named", _right(known), len(known), at_least=1.0),
            evidence.Score(
                "faults in C whose variant is known, named",
                _right(catalogue),
                len(catalogue),
                at_least=1.0,
            ),
            evidence.Score(
                "right outputs and unknown damage explained all the same",
                len(silent) - _right(silent),
                len(silent),
                at_most=0.0,
            ),
        ),
        (
            evidence.Table(
                "By operation",
                ("operation", "variants named", "silent where it must be"),
                tuple((op, count(known, op), count(silent, op)) for op in operations),
            ),
            evidence.Table(
                "What the suite said of faults in C",
                ("fault", "diagnosis"),
                tuple((each.fault, each.told) for each in catalogue),
                is_folded=True,
            ),
            evidence.Table(
                "Wrong",
                ("fault", "wanted", "told"),
                tuple((t.fault, t.wanted, t.told) for t in wrong),
            ),
        ),
        seconds,
    )


def _right(told: Sequence[Told]) -> int:
    return sum(each.is_right for each in told)


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The whole command: 0 if every goal of the record is reached, 1 if not."""
    parser = argparse.ArgumentParser(prog="python -m verification.diagnosis")
    parser.add_argument(
        "--evidence", type=Path, default=evidence.EVIDENCE, help="where the record is written"
    )
    options = parser.parse_args(arguments)
    console, clock = console or Console(), time.monotonic()
    library, catalogue = [], []
    with quiet_torch(), torch.inference_mode():
        stage = Stage()
        for operation in TAPS:
            library += stage.of_operation(operation)
            console.print(operation, [t for t in library if not t.is_right] or "")
        for told in of_catalogue():
            catalogue.append(told)
            console.print(told.fault, "" if told.is_right else told)
    record = record_of(library, catalogue, time.monotonic() - clock)
    console.print(evidence.write(record, options.evidence))
    return 0 if record.passed else 1


if __name__ == "__main__":
    sys.exit(main())
