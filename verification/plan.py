"""What is run: the options of a verification, and prompts in groups that share a step.

Decides grouping and the room an engine needs; knows nothing of values.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from engine.config import EngineConfig, ModelConfig
from engine.errors import InvalidArgument
from verification.engine_runs import GroupPrompt, blocks_needed, group_prompt
from verification.selection import Selection


@dataclass(frozen=True)
class Options:
    """What is run.

    Args:
        device: "cpu" or "cuda".
        num_threads: of the twin, 0 = every core.
        decode_tokens: last tokens of each prompt that are decoded one by one.
        continuation_tokens: tokens of the oracle's greedy text that the engine is held to.
        group_tokens: prompts are run together up to so many tokens; a longer prompt is a group
            alone. With SmolLM2 135M a run peaks at 5.5 GB (3.7 GB with 640 tokens, and 4 % slower).
        max_group_prompts: and up to so many prompts.
        block_size: of the KV cache. None: 128 on a GPU, whose tiles are of that length; 16 on the
            CPU, where smaller blocks let a decoded sequence share more of the prefilled one, so
            that less is computed twice.
        selection: which taps, layers, operations and grades are graded.
    """

    device: str = "cpu"
    num_threads: int = 0
    decode_tokens: int = 8
    continuation_tokens: int = 16
    group_tokens: int = 1040
    max_group_prompts: int = 32
    block_size: int | None = None
    selection: Selection = Selection()

    def __post_init__(self) -> None:
        """Refuse counts that mean nothing."""
        for name in ("decode_tokens", "continuation_tokens", "group_tokens", "max_group_prompts"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def kv_block_size(self) -> int:
        """Tokens per KV block."""
        return self.block_size or (128 if self.device == "cuda" else 16)


def longest_prompt(config: ModelConfig, options: Options) -> int:
    """Tokens of the longest prompt that leaves the model room for the greedy text behind it."""
    return config.max_position_embeddings - options.continuation_tokens


def plan_groups(
    prompts: Sequence[tuple[str, Sequence[int]]], config: ModelConfig, options: Options
) -> list[list[GroupPrompt]]:
    """Prompts in groups that are run as one step, in the given order.

    Args:
        prompts: (id, token ids) each.

    Raises:
        InvalidArgument: no prompts, two of one id, or one that the model cannot take.
    """
    if not prompts:
        raise InvalidArgument("nothing to verify: no prompts")
    limit = longest_prompt(config, options)
    groups: list[list[GroupPrompt]] = []
    room = 0
    for prompt_id, token_ids in prompts:
        length = len(token_ids)
        if not 1 <= length <= limit:
            raise InvalidArgument(
                f"prompt {prompt_id!r} has {length} tokens, the model takes 1 to {limit}"
            )
        if length > room or len(groups[-1]) == options.max_group_prompts:
            groups.append([])
            room = options.group_tokens
        groups[-1].append(group_prompt(prompt_id, token_ids, options.decode_tokens))
        room -= length
    ids = [p.id for group in groups for p in group]
    if len(set(ids)) != len(ids):
        raise InvalidArgument("prompt ids must be unique")
    return groups


def room_for(groups: Sequence[Sequence[GroupPrompt]], options: Options) -> EngineConfig:
    """An engine configuration with room for every group."""
    extra, block_size = options.continuation_tokens, options.kv_block_size
    return EngineConfig(
        device=options.device,
        num_threads=options.num_threads,
        block_size=block_size,
        num_blocks=max(blocks_needed(group, extra, block_size) for group in groups),
        max_seq_len=max(p.num_tokens for group in groups for p in group) + extra,
        max_num_tokens=max(sum(p.num_tokens for p in group) for group in groups),
        max_num_seqs=max(len(group) for group in groups),
    )
