"""Holds the engine and the oracle, as they are now, against what is recorded of a model.

Knows which record belongs to a model and runs both sides on the same prompts; what counts as equal
is decided in `goldens`.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch

from engine.model_runner import ModelRunner
from engine.models import cache_root
from verification import goldens
from verification.capture import capture, engine_config_for
from verification.goldens import GoldenCheck, GoldenError, GoldenVerdict
from verification.oracle import Reference
from verification.prompts import Prompt
from verification.taps import operation_of

Progress = Callable[[int, int, str], None]  # done, of how many, what


def golden_roots() -> tuple[Path, ...]:
    """Where goldens are looked for: in git, then in the cache."""
    return (goldens.GOLDEN_ROOT, cache_root() / "golden")


def check_goldens(
    name: str,
    directory: Path,
    prompts: Sequence[Prompt],
    weights_sha256: str,
    device: str = "cpu",
    progress: Progress | None = None,
    roots: Iterable[Path] | None = None,
) -> GoldenVerdict:
    """Runs engine and oracle over the prompts and compares both with the record.

    Args:
        name: of the model; its record is the directory of that name.
        directory: the model in Hugging Face form.
        prompts: each must have been recorded.
        weights_sha256: of the model's weights, as provenance.weights_sha256 gives it.
        device: the engine's; every device must give the recorded bits.
        progress: told what is under way.
        roots: where records are looked for; golden_roots() if not given.

    Returns:
        "not run" without a record; "fail" for a damaged one, other weights or other numerics.
    """
    found = goldens.find(name, golden_roots() if roots is None else roots)
    if found is None:
        return GoldenVerdict("not run", f"no goldens are recorded for {name}")
    try:
        check = GoldenCheck(goldens.load(found))
    except GoldenError as error:
        return GoldenVerdict("fail", str(error))
    known = [p for p in prompts if check.same_prompt(p.id, p.sha256)]
    with ModelRunner(directory, engine_config_for(prompts, device)) as runner:
        facts = {"weights_sha256": weights_sha256}
        if check.same_subject(**facts, numerics_version=runner.library.numerics_version):
            _run(check, runner, Reference(directory, torch.float32), known, progress)
    return check.verdict(lambda tap: operation_of(tap).name)


def _run(
    check: GoldenCheck,
    runner: ModelRunner,
    oracle: Reference,
    prompts: Sequence[Prompt],
    progress: Progress | None,
) -> None:
    for done, prompt in enumerate(prompts):
        if progress is not None:
            progress(done, len(prompts), f"goldens: {prompt.id}")
        for (tap, layer), values in capture(runner, prompt).items():
            check.add_engine(prompt.id, tap, layer, values)
        trace = oracle.run(prompt.token_ids, [len(prompt.token_ids) - 1])
        for (tap, layer), values in trace.items():
            check.add_oracle(prompt.id, tap, layer, values.numpy())
