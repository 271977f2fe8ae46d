"""Decide how much room a serving engine gets: sequences, tokens of a step, blocks of the KV cache.

Arithmetic on dimensions and bytes; knows nothing of requests. What a caller does not give follows
from the device: a GPU's cache takes a share of the memory that the model leaves, a CPU's a limit.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from engine.config import EngineConfig, ModelConfig
from engine.config_fields import is_int
from engine.errors import InvalidArgument, OutOfMemory

CPU_CACHE_BYTES = 1 << 30
BF16_BYTES = 2
MAX_SLOTS = 2**31 - 1  # a slot is an int32


@dataclass(frozen=True)
class Room:
    """What a caller may say about room, in vLLM's words; None: chosen for the device.

    Args:
        max_model_len: tokens of the longest sequence; None: the context, or what the cache holds.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: the token budget of a step, at least max_num_seqs.
        block_size: tokens per KV block.
        gpu_memory_utilization: of the memory that weights and workspace leave, over 0 .. 1.
        kv_cache_memory_bytes: of the KV cache; overrides the share, and the CPU's 1 GiB.
        num_threads: CPU threads; 0: every core.
        enforce_eager: no CUDA graphs.
    """

    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    block_size: int = 128
    gpu_memory_utilization: float = 0.9
    kv_cache_memory_bytes: int | None = None
    num_threads: int = 0
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        """Refuse what `EngineConfig` will not see, and what it could not be computed from."""
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            wish = getattr(self, name)
            if wish is not None and (not is_int(wish) or not 1 <= wish <= MAX_SLOTS):
                raise InvalidArgument(
                    f"{name} must be an integer from 1 to {MAX_SLOTS}, got {wish!r}"
                )
        share = self.gpu_memory_utilization
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
            raise InvalidArgument(
                f"gpu_memory_utilization must be over 0, at most 1, got {share!r}"
            )
        given = self.kv_cache_memory_bytes
        if given is not None and (not is_int(given) or given < 1):
            raise InvalidArgument(
                f"kv_cache_memory_bytes must be a positive integer, got {given!r}"
            )


def block_bytes(config: ModelConfig, block_size: int) -> int:
    """Bytes of one KV block, all layers, K and V."""
    values = config.num_layers * config.num_kv_heads * config.head_dim * 2 * block_size
    return values * BF16_BYTES


def make_room(
    room: Room,
    config: ModelConfig,
    device: str,
    free_bytes: Callable[[EngineConfig], int],
) -> EngineConfig:
    """The engine's room.

    Args:
        room: what the caller said.
        config: the model.
        device: "cpu" or "cuda".
        free_bytes: what the device has left beside an engine of that room, cache apart.

    Raises:
        InvalidArgument: max_model_len is over the model's context, max_num_batched_tokens is less
            than a token for each sequence, or no legal room.
        OutOfMemory: not one block fits.
    """
    context = config.max_position_embeddings
    is_gpu = device == "cuda"
    max_num_seqs = _or(room.max_num_seqs, 256 if is_gpu else 16)
    budget = room.max_num_batched_tokens
    if budget is None:
        budget = max(8192 if is_gpu else 256, max_num_seqs)
    if budget < max_num_seqs:
        raise InvalidArgument(
            f"max_num_batched_tokens must be at least max_num_seqs ({max_num_seqs}), got {budget}"
        )
    if _or(room.max_model_len, 1) > context:
        raise InvalidArgument(
            f"max_model_len must be at most {context} (max_position_embeddings), "
            f"got {room.max_model_len}"
        )
    smallest = EngineConfig(
        device=device,
        num_blocks=1,
        max_seq_len=_or(room.max_model_len, context),
        max_num_tokens=budget,
        max_num_seqs=max_num_seqs,
        num_threads=room.num_threads,
        block_size=room.block_size,
        enforce_eager=room.enforce_eager,
    )
    num_blocks = _num_blocks(room, config, smallest, free_bytes)
    if room.max_model_len is not None:
        return replace(smallest, num_blocks=num_blocks)
    # Without a wish, no sequence is longer than the cache: its last token needs no slot.
    longest = min(context, num_blocks * room.block_size + 1)
    return replace(smallest, num_blocks=num_blocks, max_seq_len=longest)


def _num_blocks(
    room: Room,
    config: ModelConfig,
    smallest: EngineConfig,
    free_bytes: Callable[[EngineConfig], int],
) -> int:
    """Blocks of the cache, as many as its bytes hold; `smallest` is the room with one."""
    if room.kv_cache_memory_bytes is not None:
        cache_bytes = room.kv_cache_memory_bytes
    elif smallest.device == "cuda":
        cache_bytes = int(free_bytes(smallest) * room.gpu_memory_utilization)
    else:
        cache_bytes = CPU_CACHE_BYTES
    one = block_bytes(config, room.block_size)
    num_blocks = min(cache_bytes // one, MAX_SLOTS // room.block_size)
    if num_blocks < 1:
        raise OutOfMemory(f"kv cache: one block needs {one} bytes, got {cache_bytes}")
    return num_blocks


def _or(wish: int | None, otherwise: int) -> int:
    return otherwise if wish is None else wish
