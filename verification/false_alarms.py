"""False alarms: correct engines of other arithmetic, put to the grades that must tolerate them.

Two kinds. Builds of the twin whose sums, chunks, tiles or segments go another legal way, and runs
with other threads and blocks: the whole suite must pass them, all but the bits that are recorded.
And transformers itself with other arithmetic (SDPA, a float32 residual stream, other matrix
products): its values stand in the engine's place, and layers, residual stream and logits must pass.
A trial is one engine on one prompt of one model; it is an alarm if any check of the prompt fails.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from engine.bindings import Library
from engine.config import ModelConfig
from engine.models import resolve
from engine.sources.toy import CONFIGS
from verification import evidence
from verification.compare import FAIL
from verification.engine_runs import group_prompt
from verification.harness import verify
from verification.interrupts import ends_in_one_line
from verification.json_lines import append_line, read_lines
from verification.localise import Findings
from verification.mutants.build import workshop
from verification.mutants.catalogue import CATALOGUE_PATH, load_catalogue
from verification.mutants.judge import quiet_torch
from verification.oracle import Reference, Trace, concatenated
from verification.plan import Options
from verification.prompts import Prompt, prompts_for
from verification.results import Results
from verification.selection import Selection
from verification.verify_op.passes import prefill_pass
from verification.whole_model import WholeModelGrader

TOYS = tuple(CONFIGS)
TRAINED = "smollm2-135m"
SHORT = 200  # tokens: longer prompts are tried on the first toy alone
BLOCK_SIZES = (32, 64, 128)  # 16 is the suite's own
THREADS = (2, 3)


@dataclass(frozen=True)
class Trials:
    """One engine on one model.

    Args:
        alarms: prompt -> the first check of it that failed.
    """

    engine: str
    model: str
    prompts: tuple[str, ...]
    alarms: dict[str, str]


class Kept:
    """Trials so far, a line each with their seconds: a run that was stopped goes on from there.

    Args:
        path: not there yet, or as an earlier run of the same suite left it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._clock = path, time.monotonic()
        lines = read_lines(path)
        self.seconds = sum(line.pop("seconds") for line in lines)
        self.trials = [Trials(**line | {"prompts": tuple(line["prompts"])}) for line in lines]

    def has(self, engine: str, model: str) -> bool:
        """Whether it was tried."""
        return any((each.engine, each.model) == (engine, model) for each in self.trials)

    def add(self, found: Trials) -> None:
        """Keeps it."""
        took, self._clock = time.monotonic() - self._clock, time.monotonic()
        self.trials.append(found)
        self.seconds += took
        append_line(self._path, asdict(found) | {"seconds": took})


def alarms_of(results: Results) -> dict[str, str]:
    """The prompts of a run of which a check failed, each with one of them."""
    alarms: dict[str, str] = {}
    for cell in results.cells:
        if cell.status == FAIL:
            words = f"{cell.mode} {cell.phase} {cell.tap}, layer {cell.layer}"
            alarms.setdefault(cell.prompt, words)
    for result in results.logits:
        if result.status == FAIL:
            alarms.setdefault(result.prompt, "logits")
    for prompt in results.tokens:
        if any(token.status == FAIL for token in prompt.tokens):
            alarms.setdefault(prompt.prompt, "tokens")
    if not results.passed and not alarms:  # pooled over prompts: the run is one alarm
        first = results.first_failure
        alarms["all prompts"] = first.message if first else "fails without a word"
    return alarms


def builds() -> Iterator[tuple[str, Library, Options]]:
    """Every legal build of the twin, and the twin itself run in other ways."""
    legal = [mutant for mutant in load_catalogue(CATALOGUE_PATH) if mutant.is_legal]
    with workshop() as shop:
        twin = shop.pristine.library()
        for mutant, tree in shop.plant_all(legal):
            yield mutant.fault, tree.library(), Options(num_threads=1)
        for size in BLOCK_SIZES:
            options = Options(num_threads=1, block_size=size)
            yield f"the twin, blocks of {size}", twin, options
        for threads in THREADS:
            yield f"the twin, {threads} threads", twin, Options(num_threads=threads)


def try_build(name: str, library: Library, options: Options, model: str) -> Trials:
    """The whole suite on one build and model."""
    prompts = _prompts(model)
    pairs = [(prompt.id, prompt.token_ids) for prompt in prompts]
    results = verify(resolve(model), pairs, options, name=model, library=library)
    tried = dict.fromkeys(cell.prompt for cell in results.cells if cell.tap == "attn")
    return Trials(name, model, tuple(tried), alarms_of(results))


def _prompts(model: str) -> tuple[Prompt, ...]:
    directory = resolve(model)
    vocab_size = ModelConfig.from_directory(directory).vocab_size
    prompts = prompts_for(model, directory, vocab_size, "all")
    return tuple(p for p in prompts if model == TOYS[0] or len(p.token_ids) < SHORT)


@dataclass(frozen=True)
class OtherTransformers:
    """transformers with other arithmetic.

    Args:
        prepare: makes the loaded model go its way.
        around: what is in force while it runs.
    """

    name: str
    dtype: torch.dtype
    prepare: Callable[[nn.Module], None] = lambda model: None
    around: Callable[[], AbstractContextManager] = nullcontext


def _use_sdpa(model: nn.Module) -> None:
    model.set_attn_implementation("sdpa")


def _round_outputs(model: nn.Module) -> None:
    """Linear layers and norms round to bfloat16; the residual stream and attention do not."""

    def rounded(module: nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output.to(torch.bfloat16).to(output.dtype)

    for name, module in model.named_modules():
        if name != "lm_head" and (isinstance(module, nn.Linear) or name.endswith("norm")):
            module.register_forward_hook(rounded)


TRANSFORMERS = (
    OtherTransformers("transformers bf16, SDPA", torch.bfloat16, _use_sdpa),
    OtherTransformers("transformers, fp32 residual stream", torch.float32, _round_outputs),
    OtherTransformers(
        "transformers bf16, products without oneDNN",
        torch.bfloat16,
        around=lambda: torch.backends.mkldnn.flags(enabled=False),
    ),
)


def try_transformers(model: str) -> Iterator[Trials]:
    """Layers, residual stream and logits of other transformers on one model."""
    directory = resolve(model)
    config = ModelConfig.from_directory(directory)
    group = [group_prompt(p.id, p.token_ids, 1) for p in _prompts(model)]

    def trace(reference: Reference) -> Trace:
        return concatenated([reference.run(p.token_ids, p.logit_rows) for p in group])

    yardstick = trace(Reference(directory, torch.bfloat16))
    oracle = trace(Reference(directory, torch.float32))
    for other in TRANSFORMERS:
        reference = Reference(directory, other.dtype)
        other.prepare(reference.model)
        with other.around():
            outputs = trace(reference)
        logits = outputs["logits", 0].float()
        outputs = {key: value.to(torch.bfloat16) for key, value in outputs.items()}
        outputs["logits", 0] = logits
        yield judge_whole(other.name, model, config, group, outputs, yardstick, oracle)


def judge_whole(
    name: str,
    model: str,
    config: ModelConfig,
    group: Sequence[object],
    outputs: Trace,
    yardstick: Trace,
    oracle: Trace,
) -> Trials:
    """Trials of values that stand in an engine's place."""
    findings = Findings(config, "cpu")
    whole = WholeModelGrader(config, findings, Selection(), None)
    run = replace(prefill_pass(group, outputs), outputs=outputs)
    whole.grade(run, yardstick, oracle)
    whole.finish()
    alarms: dict[str, str] = {}
    for finding in findings.ordered():
        words = f"{finding.tap}, layer {finding.layer}: {finding.verdict.reason}"
        alarms.setdefault(finding.prompt or "all prompts", words)
    return Trials(name, model, tuple(prompt.id for prompt in group), alarms)


def record_of(trials: Sequence[Trials], seconds: float) -> evidence.Evidence:
    """The figures of all trials."""
    engines = list(dict.fromkeys(each.engine for each in trials))
    rows, alarms = [], []
    for engine in engines:
        mine = [each for each in trials if each.engine == engine]
        models = ", ".join(dict.fromkeys(each.model for each in mine))
        count = sum(len(each.prompts) for each in mine)
        rows.append((engine, models, count, sum(len(each.alarms) for each in mine)))
        alarms += [(engine, t.model, p, words) for t in mine for p, words in t.alarms.items()]
    total = sum(len(each.prompts) for each in trials)
    return evidence.evidence(
        "false-alarms",
        "False alarms",
        "Correct engines of other arithmetic, put to the grades that must tolerate it: builds of "
        "the twin to the whole suite, transformers with other arithmetic to layers, residual "
        "stream and logits. A trial is one engine on one prompt of one model; trials of one engine "
        f"are not independent. With none in {total}, the rule of three puts the rate below "
        f"{3 / total:.2%}.",
        "make false-alarms",
        (evidence.Score("correct engines wrongly failed", len(alarms), total, at_most=0.0),),
        (
            evidence.Table(
                "Engines",
                ("engine", "models", "trials", "alarms"),
                tuple(rows),
                note=f"{TOYS[0]}: every prompt. Other models: those below {SHORT} tokens. "
                "Probes are prompts too.",
            ),
            evidence.Table("Alarms", ("engine", "model", "prompt", "check"), tuple(alarms)),
        ),
        seconds,
    )


@ends_in_one_line("what was tried so far is kept, and the same command goes on from there")
def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """The command `python -m verification.false_alarms`: 0 if there is none, 1 if there is."""
    parser = argparse.ArgumentParser(
        prog="python -m verification.false_alarms",
        description="Puts correct engines of other arithmetic to the suite; none may be failed.",
    )
    parser.add_argument(
        "--models", default=",".join((*TOYS, TRAINED)), help="with commas; default: %(default)s"
    )
    parser.add_argument("--state", type=Path, default=Path("build"), help="where a run goes on")
    parser.add_argument(
        "--evidence", type=Path, default=evidence.EVIDENCE, help="where the record is written"
    )
    options = parser.parse_args(arguments)
    console, models = console or Console(), options.models.split(",")
    kept = Kept(options.state / f"false-alarms-{evidence.suite_sha256()[:12]}.jsonl")
    with quiet_torch(), torch.inference_mode():
        for found in _missing(models, kept):
            kept.add(found)
            console.print(
                f"{found.engine}, {found.model}: {len(found.prompts)}", found.alarms or ""
            )
    record = record_of(kept.trials, kept.seconds)
    console.print(evidence.write(record, options.evidence))
    return 0 if record.passed else 1


def _missing(models: Sequence[str], kept: Kept) -> Iterator[Trials]:
    """Every engine on every model, but what is kept."""
    for model in models:
        if not all(kept.has(other.name, model) for other in TRANSFORMERS):
            yield from (
                each for each in try_transformers(model) if not kept.has(each.engine, model)
            )
    for name, library, options in builds():
        for model in models:
            if not kept.has(name, model):
                yield try_build(name, library, options, model)


if __name__ == "__main__":
    sys.exit(main())
