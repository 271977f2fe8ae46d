"""The points at which the engine is timed, what is wanted there, and the least time they can take.

Pure arithmetic over a model's dimensions; knows no device.
"""

from dataclasses import dataclass

from engine.config import ModelConfig

MODEL = "llama-3.2-1b-shape"
BYTES = 2  # of a bf16 value


@dataclass(frozen=True)
class Point:
    """One point.

    Args:
        kind: "decode" (ms per step of all sequences) or "prefill" (ms per prompt).
        batch: sequences.
        context: tokens in the cache before the step, or of the prompt.
        target: wanted milliseconds.
        steps: greedy steps of one timed call.
    """

    kind: str
    batch: int
    context: int
    target: float
    steps: int = 1

    @property
    def name(self) -> str:
        """As tables show it: "decode B=8, 512"."""
        return f"{self.kind} B={self.batch}, {self.context}"


POINTS = (
    Point("decode", 1, 128, 0.72, 64),
    Point("decode", 1, 4096, 0.78, 64),
    Point("decode", 1, 16384, 0.95, 32),
    Point("decode", 8, 512, 0.80, 64),
    Point("decode", 32, 512, 1.00, 32),
    Point("decode", 128, 512, 1.9, 16),
    Point("decode", 256, 1024, 3.6, 8),
    Point("prefill", 1, 512, 2.4),
    Point("prefill", 1, 2048, 8.5),
    Point("prefill", 1, 8192, 42.0),
)
TARGETS = {"load, s": 1.5, "memory beyond weights and KV pool, MB": 400.0}


@dataclass(frozen=True)
class Limits:
    """What the card can do, measured in the same run.

    Args:
        read: bytes per second from device memory.
        multiply: bf16 floating-point operations per second of a large product.
    """

    read: float
    multiply: float


def floor_ms(point: Point, config: ModelConfig, limits: Limits) -> float:
    """The least time of a point: every byte read once, every product done once, at the limits.

    The larger of the two, as if either were wholly hidden behind the other.
    """
    kv_bytes = 2 * config.num_kv_heads * config.head_dim * config.num_layers * BYTES  # per token
    per_layer = layer_weights(config)
    head = config.vocab_size * config.hidden_size
    per_key = 4 * config.num_heads * config.head_dim * config.num_layers  # of scores and values
    weights = per_layer * config.num_layers + head
    if point.kind == "decode":
        keys = point.batch * (point.context + (point.steps + 1) / 2)
        num_bytes = weights * BYTES + keys * kv_bytes
        operations = 2 * point.batch * weights + keys * per_key
    else:
        keys = point.context * (point.context + 1) / 2
        num_bytes = weights * BYTES
        operations = 2 * (point.context * per_layer * config.num_layers + head) + keys * per_key
    return 1e3 * max(num_bytes / limits.read, operations / limits.multiply)


def layer_weights(config: ModelConfig) -> int:
    """Values in the matrices of one layer."""
    heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    attention = config.hidden_size * (heads + config.num_heads * config.head_dim)
    return attention + 3 * config.hidden_size * config.intermediate_size
