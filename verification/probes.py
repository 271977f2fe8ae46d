"""Structured inputs for every operation: values that a prompt seldom brings, where faults hide.

Decides what is forced into every tap of a probe run; knows nothing of engines or verdicts. The
operations' truth is computed from these very values, so a probe needs no transformers. What each
input is for:

- residual stream: rows of root mean square 1e-3 to 1e3, some with one massive channel (eps, sums of
  squares);
- attention, by turns over rows and heads: a zero query (the plain mean: every key counts the same),
  a needle (one key takes all: the newest, the one before, the first, the tile's edges), scores that
  rise with position (each tile raises the maximum) and scores that fall and lie far below zero (the
  first key leads; a maximum that starts at zero underflows);
- gate: up to where SiLU saturates; final_norm: a row of zeros, whose logits all tie.

Source: Touchstone's verification notes 2.3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import ModelConfig
from verification.engine_runs import GroupPrompt, group_prompt
from verification.oracle import Trace
from verification.rounding import to_bf16
from verification.selection import PROBE_PREFIX
from verification.taps import POINT, all_keys

LENGTHS = (1, 129, 260)  # one key; a tile with one key; more than two tiles
SEED = 11

ROW_SCALES = (1e-3, 3e-3, 0.02, 1.0, 1e3)  # RMS of residual rows
MASSIVE = 300.0  # times the row's scale, in one channel of every third row
GATE_SCALES = (1.0, 4.0, 10.0)

KEY_BASE, KEY_RAMP = 12.0, 4.0  # along one direction: 12 for the first key to 16 for the last
NEEDLE = 2.0  # the needle's score lies 2 sqrt(head_dim) above the others
RISE = 16.0  # scores rise by RISE * KEY_RAMP / sqrt(head_dim) over the prompt
FALL = 100.0  # scores from -FALL * KEY_BASE / sqrt(head_dim) = -150 down


def probe_group(config: ModelConfig, num_decode: int) -> list[GroupPrompt]:
    """The probes as prompts; their ids reach both ends of the vocabulary.

    Args:
        num_decode: last tokens that are decoded one by one.
    """
    size = config.vocab_size
    ids = [(-i if i % 2 else i) % size for i in range(max(LENGTHS))]
    return [
        group_prompt(f"{PROBE_PREFIX}{length}", ids[:length], num_decode)
        for length in LENGTHS
        if length <= config.max_position_embeddings
    ]


def probe_trace(config: ModelConfig, group: Sequence[GroupPrompt]) -> Trace:
    """What is forced into every tap but the logits, bfloat16 [rows, width], prompts in order."""
    generator = torch.Generator().manual_seed(SEED)
    parts = [_prompt_trace(config, prompt, generator) for prompt in group]
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _prompt_trace(config: ModelConfig, prompt: GroupPrompt, generator: torch.Generator) -> Trace:
    rows, trace = prompt.num_tokens, {}
    for name, layer in all_keys(config.num_layers):
        if name in ("logits", "q_rope", "k_rope"):
            continue
        count = len(prompt.logit_rows) if name == "final_norm" else rows
        values = torch.randn(count, POINT[name].width(config), generator=generator)
        if name in ("embed", "attn_residual", "mlp_residual"):
            values = _residual(values, layer)
        elif name == "gate":
            values *= _by_turns(GATE_SCALES, count)
        elif name == "final_norm":
            values[[0, -1]] = 0.0
        trace[name, layer] = to_bf16(values)
    for layer in range(config.num_layers):
        queries, keys = _queries_and_keys(config, rows, layer, generator)
        trace["q_rope", layer], trace["k_rope", layer] = to_bf16(queries), to_bf16(keys)
    return trace


def _residual(values: Tensor, layer: int) -> Tensor:
    values[::3, (7 * layer + 3) % values.shape[1]] = MASSIVE
    return values * _by_turns(ROW_SCALES, len(values))


def _by_turns(scales: Sequence[float], count: int) -> Tensor:
    return torch.tensor(scales)[torch.arange(count) % len(scales)][:, None]


def _queries_and_keys(
    config: ModelConfig, rows: int, layer: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """q_rope and k_rope of one layer, float32, heads flattened."""
    num_kv_heads, head_dim = config.num_kv_heads, config.head_dim
    group = config.num_heads // num_kv_heads
    axis = torch.randn(num_kv_heads, head_dim, generator=generator)
    axis /= axis.norm(dim=-1, keepdim=True)
    noise = torch.randn(rows, num_kv_heads, head_dim, generator=generator)
    # The axis alone decides rising and falling.
    noise -= (noise * axis).sum(-1, keepdim=True) * axis
    along = KEY_BASE + KEY_RAMP * torch.arange(rows) / rows
    keys = noise + along[:, None, None] * axis

    position = torch.arange(rows)
    start = position // 128 * 128
    places = torch.stack((position, position - 1, start * 0, start, start - 1)).clamp_min(0)
    queries = torch.empty(rows, config.num_heads, head_dim)
    for head in range(config.num_heads):
        kv_head = head // group
        kinds = (
            torch.zeros(rows, head_dim),
            NEEDLE * noise[places[(position // 4 + head) % len(places), position], kv_head],
            (RISE * axis[kv_head]).expand(rows, -1),
            (-FALL * axis[kv_head]).expand(rows, -1),
        )
        turn = (position + head + layer) % len(kinds)
        queries[:, head] = torch.stack(kinds)[turn, position]
    return queries.flatten(1), keys.flatten(1)
