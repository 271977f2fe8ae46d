"""Captures what an engine computes at every tap of a free-running prefill, on any device.

Knows the engine's taps and its paged cache; knows nothing of transformers, of files or of verdicts.
Invariant: every prompt starts with its own blocks and an empty past, so no prompt sees another.
"""

from collections.abc import Callable, Sequence

import numpy as np

from engine.batch import SequenceSlice, build_batch
from engine.bindings import Tap, TapPoint
from engine.config import EngineConfig
from engine.model_runner import ModelRunner
from verification.goldens import bit_hash
from verification.prompts import Prompt
from verification.taps import TapKey, all_keys


def engine_config_for(
    prompts: Sequence[Prompt], device: str, num_threads: int = 0, block_size: int = 128
) -> EngineConfig:
    """Just enough room to prefill the longest of these prompts in one step."""
    longest = max(len(prompt.token_ids) for prompt in prompts)
    return EngineConfig(
        device=device,
        num_threads=num_threads,
        block_size=block_size,
        num_blocks=-(-longest // block_size),
        max_seq_len=longest,
        max_num_tokens=longest,
        max_num_seqs=1,
    )


def capture(runner: ModelRunner, prompt: Prompt) -> dict[TapKey, np.ndarray]:
    """Every tap of one prompt's prefill.

    Args:
        runner: room for the whole prompt in one step; what its cache holds is overwritten.
        prompt: one row per token, but one row only, the last token's, for final_norm and logits.

    Returns:
        uint16 bf16 bits, float32 for the logits.
    """
    block_size = runner.engine_config.block_size
    blocks = list(range(-(-len(prompt.token_ids) // block_size)))
    batch = build_batch([SequenceSlice(prompt.token_ids, 0, blocks)], block_size, logits="last")
    values = {
        (name, layer): runner.tap_buffer(TapPoint[name], batch)
        for name, layer in all_keys(runner.config.num_layers)
    }
    runner.forward(batch, [Tap(TapPoint[n], layer, out=v) for (n, layer), v in values.items()])
    return values


def capture_bit_hashes(
    runner: ModelRunner,
    prompts: Sequence[Prompt],
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, dict[TapKey, str]]:
    """The hash of every tap's bytes for every prompt, by prompt id.

    Args:
        runner: as for `capture`; its device decides whose bits these are.
        prompts: each prefilled alone.
        progress: told how many prompts are done, of how many, and what is under way.
    """
    hashes = {}
    for done, prompt in enumerate(prompts):
        if progress is not None:
            progress(done, len(prompts), f"engine: {prompt.id}")
        values = capture(runner, prompt)
        hashes[prompt.id] = {key: bit_hash(key[0], value) for key, value in values.items()}
    return hashes
