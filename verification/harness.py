"""Verifies one model: runs transformers and the engine over the prompts, grades, and gives results.

Decides the order of work and how prompts are grouped; every judgement is made in `operators`,
`state`, `composition` and `compare`. Invariant: the verdict is pass only if something was graded
and nothing failed.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from engine.bindings import Library
from engine.config import ModelConfig
from engine.model_runner import ModelRunner
from engine.ops import Ops
from verification.engine_runs import GroupPrompt, GroupRun, ModeRun
from verification.expected import RopeRows
from verification.golden_check import GoldenRun
from verification.goldens import GoldenVerdict
from verification.localise import Findings
from verification.operators import OperatorGrader
from verification.oracle import Continuation, Past, Reference, Trace, concatenated
from verification.passes import PREFILL
from verification.plan import Options, plan_groups, room_for
from verification.probes import probe_group, probe_trace
from verification.provenance import cpu_name, software_versions, weights_sha256
from verification.results import Results
from verification.state import StateGrader
from verification.steps import Runner
from verification.summary import summarise
from verification.whole_model import WholeModelGrader

Progress = Callable[[int, int, str], None]  # done, total, what is under way
RopeTable = Callable[[int], np.ndarray]  # positions -> uint16 [positions, head_dim]: cos, then sin


@dataclass(frozen=True)
class EngineUnderTest:
    """An engine with what is reported about it."""

    runner: Runner
    rope_table: RopeTable | None
    numerics_version: str
    source_stamp: str


@dataclass(frozen=True)
class Subject:
    """The model that an engine is held to.

    Args:
        yardstick, oracle: transformers in bfloat16 and in float32.
        decode_text: token ids -> text, for the results.
    """

    name: str
    weights_sha256: str
    yardstick: Reference
    oracle: Reference
    decode_text: Callable[[Sequence[int]], str] | None = None


def verify(
    model_dir: Path,
    prompts: Sequence[tuple[str, Sequence[int]]],
    options: Options | None = None,
    progress: Progress | None = None,
    *,
    name: str | None = None,
    library: Library | None = None,
    decode_text: Callable[[Sequence[int]], str] | None = None,
    goldens: GoldenRun | None = None,
) -> Results:
    """Verifies the engine on a model.

    Args:
        model_dir: the model in Hugging Face form.
        prompts: (id, token ids) each, at least one, ids unique.
        progress: told after each piece of work.
        name: of the model, for the results; the directory's if not given.
        library: by default the one that make builds.
        decode_text: token ids -> text, for the results.
        goldens: of these prompts, held against the run.

    Raises:
        InvalidArgument: no prompts, or one that the model cannot take.
        EngineError: the engine refused the model or failed.
    """
    options = options or Options()
    library = library or Library()
    config = ModelConfig.from_directory(model_dir)
    groups = plan_groups(prompts, config, options)
    probes = probe_group(config, options.decode_tokens)
    engine_config = room_for([*groups, probes], options)
    with (
        closing(ModelRunner(model_dir, engine_config, library)) as runner,
        closing(Ops(library, "cpu")) as ops,
    ):
        engine = EngineUnderTest(
            runner,
            lambda positions: ops.rope_table(config, positions),
            library.numerics_version,
            library.source_stamp,
        )
        work = _Progress(progress, [*groups, probes], config.num_layers)
        work.says("loading transformers")
        subject = Subject(
            name or Path(model_dir).name,
            weights_sha256(model_dir, config),
            Reference(model_dir, torch.bfloat16),
            Reference(model_dir, torch.float32),
            decode_text,
        )
        return verify_engine(engine, subject, groups, options, work, probes, goldens)


def verify_engine(
    engine: EngineUnderTest,
    subject: Subject,
    groups: Sequence[Sequence[GroupPrompt]],
    options: Options,
    work: "_Progress | None" = None,
    probes: Sequence[GroupPrompt] = (),
    goldens: GoldenRun | None = None,
) -> Results:
    """Verifies any engine that speaks Runner.

    Args:
        groups: as of plan_groups; the engine has the room of room_for.
        probes: as of probe_group; the engine has room for them too.
        goldens: of these prompts, held against the run.
    """
    started, clock = datetime.now(UTC), time.monotonic()
    work = work or _Progress(None, groups, engine.runner.config.num_layers)
    everything = [*groups, probes] if probes else groups
    longest = max(p.num_tokens for group in everything for p in group)
    num_blocks = room_for(everything, options).num_blocks
    if goldens is not None:
        goldens.begin(
            weights_sha256=subject.weights_sha256, numerics_version=engine.numerics_version
        )
    run = _Verification(engine, subject, options, work, num_blocks, longest, goldens)
    run.state.grade_rope_table(engine.rope_table, subject.yardstick)
    if probes:
        run.grade_probes(probes)
    for group in groups:
        run.grade_group(group)
    run.whole.finish()
    work.step("done")
    seconds = round(time.monotonic() - clock, 3)
    return _results(run, engine, subject, options, goldens, started, seconds)


class _Verification:
    """The graders of one run and the order of work within a group of prompts."""

    def __init__(
        self,
        engine: EngineUnderTest,
        subject: Subject,
        options: Options,
        work: "_Progress",
        num_blocks: int,
        longest: int,
        goldens: GoldenRun | None,
    ) -> None:
        self._goldens = goldens
        self._runner = engine.runner
        self._config = config = engine.runner.config
        self._subject = subject
        self._options = options
        self._work = work
        self._num_blocks = num_blocks
        self.findings = Findings(config, options.device)
        wants = options.selection.wants
        rope = _rope_rows(engine.rope_table, subject.yardstick, longest)
        self.operators = OperatorGrader(subject.yardstick, config, rope, self.findings, wants)
        self.state = StateGrader(config, self.findings, wants)
        self.whole = WholeModelGrader(config, self.findings, options.selection, subject.decode_text)

    def grade_probes(self, probes: Sequence[GroupPrompt]) -> None:
        """Every operation on structured inputs."""
        self._work.step("engine, probes")
        run = GroupRun(self._runner, probes, self._num_blocks)
        local = run.run(probe_trace(self._config, probes))
        self.state.grade(run, local)
        # transformers never saw these inputs: the operations' own truth is all there is to hold to.
        passes = [replace(each, reference=None) for each in local.passes]
        self.operators.grade(passes, lambda layer: self._work.step(f"probed layer {layer}"))

    def grade_group(self, group: Sequence[GroupPrompt]) -> None:
        """One group of prompts: known inputs, running free, greedy text, the whole.

        A group's values are gigabytes, so each is made as late and dropped as early as can be.
        """
        extra = self._options.continuation_tokens
        run = GroupRun(self._runner, group, self._num_blocks, extra)
        self._work.step("transformers, bfloat16")
        known, usual = _traces(self._subject.yardstick, group)
        self._work.step("engine, known inputs")
        local = run.run(known)
        self.state.grade(run, local)
        self._work.step("engine, running free")
        free = run.run(None)
        self.state.grade(run, free)
        self._work.step("engine, without taps")
        self.state.grade_untapped(run, free)
        passes = [*local.passes, *free.passes]
        self.operators.grade(passes, lambda layer: self._work.step(f"graded layer {layer}"))
        del local, passes
        self._work.step("transformers, float32")
        truth, oracle = _traces(self._subject.oracle, group)
        if self._options.selection.has_grade("tokens"):
            self._work.step("greedy text")
            texts, choices = _greedy(run, free, group, self._subject.oracle, oracle, extra)
            along = [
                self._subject.yardstick.along(past, text.token_ids[:-1])
                for past, text in zip(usual, texts, strict=True)
            ]
            self.whole.grade_tokens(group, texts, choices, along)
            if self._goldens is not None:
                for prompt, text in zip(group, texts, strict=True):
                    self._goldens.add_text(prompt.id, text.token_ids)
        self._work.step("grading the whole")
        self.whole.grade(free.passes[0], known, truth)
        if self._goldens is not None:
            self._goldens.add_group(free.passes[0], truth)


def _results(
    run: _Verification,
    engine: EngineUnderTest,
    subject: Subject,
    options: Options,
    goldens: GoldenRun | None,
    started: datetime,
    seconds: float,
) -> Results:
    """What the graders of a finished run hold."""
    cells = run.whole.merged([*run.state.cells, *run.operators.cells])
    found = goldens.verdict() if goldens else GoldenVerdict("not run", "only a part was verified")
    was_graded = bool(cells or run.whole.tokens)
    is_pass = was_graded and not run.findings.failed and found.status != "fail"
    return Results(
        model={
            "name": subject.name,
            "weights_sha256": subject.weights_sha256,
            "config": asdict(engine.runner.config),
        },
        engine={
            "device": options.device,
            "numerics_version": engine.numerics_version,
            "source_stamp": engine.source_stamp,
        },
        versions=software_versions(),
        machine={"cpu": cpu_name(), "cores": torch.get_num_threads()},
        started=started.isoformat(timespec="seconds"),
        seconds=seconds,
        verdict="pass" if is_pass else "fail",
        summary=tuple(summarise(cells, run.findings, run.state.not_run)),
        cells=tuple(cells),
        ulp_histogram=dict(run.operators.histograms),
        residual_growth=run.whole.growth(),
        logits=tuple(run.whole.logits),
        tokens=tuple(run.whole.tokens),
        goldens=found,
        first_failure=run.findings.first(),
        failed_checks=run.findings.count_by_level(),
    )


def _traces(reference: Reference, group: Sequence[GroupPrompt]) -> tuple[Trace, list[Past]]:
    """The values of the group's rows, and what a text after each prompt needs."""
    runs = [reference.run_and_keep(p.token_ids, p.logit_rows) for p in group]
    return concatenated([trace for trace, _ in runs]), [past for _, past in runs]


def _rope_rows(rope_table: RopeTable | None, reference: Reference, num_positions: int) -> RopeRows:
    """Cos and sin of the first positions: the engine's own where it shows them."""
    if rope_table is not None:
        return RopeRows(torch.from_numpy(rope_table(num_positions)).view(torch.bfloat16), True)
    return RopeRows(torch.cat(reference.rope_table(range(num_positions)), 1), False)


def _greedy(
    run: GroupRun,
    free: ModeRun,
    group: Sequence[GroupPrompt],
    oracle: Reference,
    pasts: Sequence[Past],
    count: int,
) -> tuple[list[Continuation], list[list[int]]]:
    """The oracle's greedy texts, and the engine's choices along them.

    The engine's own text is the draft of the oracle's. Where they are the same, its choices along
    the text are made; where they part, it is led along the oracle's.
    """
    last_ids = free.next_ids[PREFILL][np.cumsum([len(p.logit_rows) for p in group]) - 1]
    drafts = run.decode_on(free.tables, last_ids, count)
    texts = [oracle.greedy(past, count, drafts[i]) for i, past in enumerate(pasts)]
    parted = {i: t.token_ids for i, t in enumerate(texts) if list(t.token_ids) != drafts[i]}
    led = run.decode_on(free.tables, last_ids, count, parted)
    return texts, [led.get(i, drafts[i]) for i in range(len(group))]


class _Progress:
    """Counts pieces of work."""

    STEPS_PER_GROUP = 7

    def __init__(
        self, report: Progress | None, groups: Sequence[Sequence[GroupPrompt]], num_layers: int
    ) -> None:
        self._report = report
        self._done = 0
        self._total = len(groups) * (self.STEPS_PER_GROUP + num_layers)

    def says(self, what: str) -> None:
        if self._report is not None:
            self._report(min(self._done, self._total), self._total, what)

    def step(self, what: str) -> None:
        self.says(what)
        self._done += 1
