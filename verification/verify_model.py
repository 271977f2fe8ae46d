"""One model's whole verification: the harness, the goldens and the GPU's record, as verify.json.

Decides what a run is held against beside transformers; knows nothing of command lines or files. A
failed golden or GPU record fails the whole.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import transformers

from engine.config import ModelConfig
from engine.models import name_of
from verification.golden_check import GoldenRun, golden_roots
from verification.goldens import GoldenVerdict
from verification.gpu_record import check_gpu_record
from verification.harness import Progress, verify
from verification.plan import Options, longest_prompt
from verification.prompts import Prompt, decoder_for
from verification.selection import Selection


def verify_model(
    model: str,
    directory: Path,
    prompts: Sequence[Prompt],
    device: str,
    selection: Selection,
    progress: Progress,
    may_leave_out: bool = False,
) -> dict:
    """Verifies the engine on a model.

    Args:
        model: a name, a directory or a hub id, as it was asked for.
        directory: its files.
        prompts: at least one.
        device: "cpu" or "cuda".
        selection: what is graded; less than everything is held against no record.
        progress: told after each piece of work.
        may_leave_out: prompts that are too long for the model are not run; else they are refused.

    Returns:
        verify.json as a dict.

    Raises:
        EngineError: the engine or transformers refused the model or failed.
    """
    transformers.utils.logging.disable_progress_bar()  # the progress shown is our own
    name = name_of(model)
    options = Options(device=device, selection=selection)
    limit = longest_prompt(ModelConfig.from_directory(directory), options)
    left_out = [p for p in prompts if may_leave_out and len(p.token_ids) > limit]
    prompts = [p for p in prompts if p not in left_out]
    # A selection of taps or layers leaves too little to hold against the record.
    goldens = GoldenRun(name, prompts, golden_roots(model)) if selection.is_everything else None
    results = verify(
        directory,
        [(prompt.id, prompt.token_ids) for prompt in prompts],
        options,
        progress,
        name=name,
        decode_text=decoder_for(directory),
        goldens=goldens,
    ).to_json()
    results["model"]["asked_as"] = model  # a path or hub id says more than its name
    reason = f"longer than the {limit} tokens that the model takes"
    results["prompts_not_run"] = [{"prompt": p.id, "reason": reason} for p in left_out]
    return _with_gpu_record(results, _gpu_record(results, prompts, goldens))


def _gpu_record(
    results: dict, prompts: Sequence[Prompt], goldens: GoldenRun | None
) -> GoldenVerdict:
    """What the record of a GPU says of this run."""
    if goldens is None:
        return GoldenVerdict("not run", "only a selection was verified")
    name, weights = results["model"]["name"], results["model"]["weights_sha256"]
    prompt_ids = [prompt.id for prompt in prompts]
    return check_gpu_record(name, weights, prompt_ids, goldens.verdict(), goldens.golden)


def _with_gpu_record(results: dict, gpu: GoldenVerdict) -> dict:
    """The results with the verdict of the GPU record; a failed one fails the whole."""
    verdict = "fail" if gpu.status == "fail" else results["verdict"]
    return {**results, "gpu_record": asdict(gpu), "verdict": verdict}
