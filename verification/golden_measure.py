"""Asks the oracle, the yardstick and the engine for what a golden record keeps of each prompt.

Knows how to run all three on the same tokens; knows nothing of files or of what changed since the
last record.
"""

import os
import platform
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import transformers

from engine.model_runner import ModelRunner
from verification import goldens
from verification.capture import capture_bit_hashes, engine_config_for
from verification.goldens import GoldenPrompt, fingerprint
from verification.oracle import Past, Reference
from verification.prompts import Prompt
from verification.provenance import weights_sha256
from verification.taps import TapKey, all_keys

NUM_TOKENS = 16  # greedy tokens kept per prompt

Progress = Callable[[int, int, str], None]  # done, of how many, what


def measure(
    directory: Path, prompts: Sequence[Prompt], progress: Progress, device: str = "cpu"
) -> tuple[dict[str, object], dict[str, GoldenPrompt]]:
    """Runs every prompt through oracle, yardstick and engine.

    Args:
        directory: the model in Hugging Face form.
        prompts: as the model reads them.
        progress: told what is under way.
        device: the engine's.

    Returns:
        Facts for the manifest, and a record per prompt id.
    """
    with ModelRunner(directory, engine_config_for(prompts, device)) as runner:
        bits = capture_bit_hashes(runner, prompts, progress)
        facts = {
            "weights_sha256": weights_sha256(directory, runner.config),
            "tokenizer_sha256": _tokenizer_sha256(directory),
            "numerics_version": runner.library.numerics_version,
            "source_stamp": runner.library.source_stamp,
            "device": device,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
    oracle, yardstick = Reference(directory, torch.float32), Reference(directory, torch.bfloat16)
    records = {}
    for done, prompt in enumerate(prompts):
        progress(done, len(prompts), f"oracle: {prompt.id}")
        records[prompt.id] = _record(oracle, yardstick, prompt, bits[prompt.id])
    return facts, records


def _record(
    oracle: Reference, yardstick: Reference, prompt: Prompt, bits: dict[TapKey, str]
) -> GoldenPrompt:
    last = [len(prompt.token_ids) - 1]
    truth, past = oracle.run_and_keep(prompt.token_ids, last)
    usual = yardstick.run(prompt.token_ids, last)
    keys = list(all_keys(oracle.num_layers))
    tokens, gaps = greedy(oracle, past, NUM_TOKENS)
    return GoldenPrompt(
        prompt_sha256=prompt.sha256,
        tokens=tokens,
        gaps=gaps,
        fingerprints={key: fingerprint(truth[key].numpy()) for key in keys},
        yardstick_error={key: relative_error(usual[key], truth[key]) for key in keys},
        bits={key: bits[key] for key in keys},
    )


def greedy(
    oracle: Reference, past: Past, num_tokens: int
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The oracle's greedy continuation and each token's lead over the second choice, in logits."""
    text = oracle.greedy(past, num_tokens)
    best = text.logits.topk(2).values
    return text.token_ids, tuple((best[:, 0] - best[:, 1]).tolist())


def relative_error(found: torch.Tensor, truth: torch.Tensor) -> float:
    """RMS of the error over RMS of the truth, over all rows."""
    error = (found.double() - truth.double()).square().mean().sqrt()
    size = truth.double().square().mean().sqrt()
    return float(error / size) if size else float(error)


def _tokenizer_sha256(directory: Path) -> str | None:
    path = directory / "tokenizer.json"
    return goldens.file_sha256(path) if path.exists() else None
