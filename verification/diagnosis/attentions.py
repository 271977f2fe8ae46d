"""Wrong attention: the scale, the mask, the head map, keys lost, another sequence's cache."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engine.config import ModelConfig
from verification import budgets
from verification.diagnosis.scene import Guess, Scene
from verification.expected import Bounded
from verification.passes import Segment
from verification.truth import KEY_TILE, AttentionExpected
from verification.truth import attention as attention_truth

LN_2 = math.log(2.0)
SEGMENT = 8 * KEY_TILE  # keys; docs/numerics.md

Mask = Callable[[Tensor, Tensor], Tensor]  # (positions [rows, 1], keys [1, keys]) -> visible


def _causal(at: Tensor, keys: Tensor) -> Tensor:
    return keys <= at


@dataclass(frozen=True)
class Change:
    """Causal attention with one thing changed.

    Args:
        scale: times the queries, in float64.
        sees: which keys a position sees.
        kv_heads: kv head of each query head, for K and V alike; None: the right one.
        query_heads: the head whose query each head takes; None: its own.
        value_heads: as kv_heads, for V alone.
        ends_at_known: the sequence's last key ends what is seen.
        keys, values: what K and V are made of.
    """

    words: str
    scale: float = 1.0
    sees: Mask = _causal
    kv_heads: list[int] | None = None
    query_heads: list[int] | None = None
    value_heads: list[int] | None = None
    ends_at_known: bool = False
    keys: Callable[[Tensor, Tensor], Tensor] = field(default=lambda k, v: k)
    values: Callable[[Tensor, Tensor], Tensor] = field(default=lambda k, v: v)


def guesses(scene: Scene) -> Iterator[Guess]:
    """What is known to go wrong in attention."""
    for change in (*_scales(scene.config), *_masks(), *_heads(scene.config)):
        yield _guess(scene, change)
    yield from _other_sequences(scene)


def _scales(config: ModelConfig) -> Iterator[Change]:
    head_dim = config.head_dim
    yield Change("attention without 1 / sqrt(head_dim)", math.sqrt(head_dim))
    yield Change("attention with 1 / head_dim for 1 / sqrt(head_dim)", 1 / math.sqrt(head_dim))
    yield Change("attention with 2 for e: log2 e is missing", LN_2)
    yield Change("attention with log2 e taken twice", 1 / LN_2)
    yield Change("attention with 1 / sqrt(hidden_size)", math.sqrt(head_dim / config.hidden_size))
    yield Change("a plain mean: scores are ignored", 0.0)


def _masks() -> Iterator[Change]:
    yield Change("attention that sees the next token", sees=lambda at, k: k <= at + 1)
    yield Change(
        "attention that sees the next token of its tile",
        sees=lambda at, k: (k <= at) | ((k == at + 1) & (k % KEY_TILE > 0)),
    )
    yield Change(
        "attention without a causal mask", sees=lambda at, k: at + k >= 0, ends_at_known=True
    )
    yield Change("attention that misses the newest key", sees=lambda at, k: k < at)
    yield Change("attention that misses the first key", sees=lambda at, k: (k <= at) & (k > 0))
    yield Change("attention to its own token alone", sees=lambda at, k: k == at)
    yield Change(
        "attention without the last key of each tile",
        sees=lambda at, k: (k <= at) & (k % KEY_TILE != KEY_TILE - 1),
    )
    yield Change(
        "attention without the first key of each tile",
        sees=lambda at, k: (k <= at) & (k % KEY_TILE > 0),
    )
    yield Change(
        "attention without a newest key that begins a tile",
        sees=lambda at, k: (k <= at) & ((k < at) | (at % KEY_TILE > 0) | (at == 0)),
    )
    yield Change(
        "attention without the newest tile",
        sees=lambda at, k: (k <= at) & ((k // KEY_TILE < at // KEY_TILE) | (at < KEY_TILE)),
    )
    yield Change(
        "attention to the newest tile alone",
        sees=lambda at, k: (k <= at) & (k // KEY_TILE == at // KEY_TILE),
    )
    yield Change("attention to the first tile alone", sees=lambda at, k: (k <= at) & (k < KEY_TILE))
    yield Change(
        "attention to the first segment alone", sees=lambda at, k: (k <= at) & (k < SEGMENT)
    )


def _heads(config: ModelConfig) -> Iterator[Change]:
    num_heads, num_kv = config.num_heads, config.num_kv_heads
    group = num_heads // num_kv
    if group > 1 and num_kv > 1:
        heads = range(num_heads)
        yield Change(
            "attention with head % num_kv_heads for the kv head",
            kv_heads=[head % num_kv for head in heads],
        )
        yield Change(
            "attention with head / num_kv_heads for the kv head",
            kv_heads=[min(head // num_kv, num_kv - 1) for head in heads],
        )
        yield Change(
            "attention with queries dealt to kv heads in turn (head % num_kv_heads)",
            query_heads=[(head % group) * num_kv + head // group for head in heads],
        )
    if num_kv > 1:
        zeros = [0] * num_heads
        yield Change("attention to kv head 0 from every head", kv_heads=zeros)
        yield Change("attention with the values of kv head 0", value_heads=zeros)
    yield Change("attention with K for V", values=lambda k, v: k)
    yield Change("attention with V for K", keys=lambda k, v: v)


def _guess(scene: Scene, change: Change) -> Guess:
    (q, *_), run, config = scene.inputs(), scene.run, scene.config
    parts, defined = [], []
    for index, segment in enumerate(run.segments):
        k, v = run.keys(scene.layer, index)
        part, is_defined = _attend(q[segment.rows], k, v, segment.first_position, config, change)
        parts.append(part)
        defined.append(is_defined)
    return Guess(change.words, _joined(parts, config), torch.cat(defined))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, first: int, config: ModelConfig, change: Change
) -> tuple[AttentionExpected, Tensor]:
    """One sequence; and the rows whose keys are all known and not none."""
    head_dim, num_heads = config.head_dim, config.num_heads
    positions = torch.arange(first, first + len(q))[:, None]
    # One key more than is known: a mask that reaches it wants what no one has.
    visible = change.sees(positions, torch.arange(len(k) + 1)[None, :])
    is_known = ~visible[:, -1] | change.ends_at_known
    visible = visible[:, :-1]
    is_defined = visible.any(1) & is_known
    right = [head // (num_heads // config.num_kv_heads) for head in range(num_heads)]

    def spread(values: Tensor, heads: list[int] | None) -> Tensor:
        rows = values.view(len(values), -1, head_dim)
        return rows[:, heads or right].reshape(len(values), -1)

    own = q.view(len(q), num_heads, head_dim)
    taken = own[:, change.query_heads or list(range(num_heads))].reshape(q.shape)
    result = attention_truth(
        taken.double() * change.scale,
        spread(change.keys(k, v), change.kv_heads),
        spread(change.values(k, v), change.value_heads or change.kv_heads),
        first,
        head_dim,
        visible=visible,
    )
    return result, is_defined


def _joined(parts: list[AttentionExpected], config: ModelConfig) -> Bounded:
    names = ("value", "mean_magnitude", "spread", "score_condition", "num_tiles")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    whole = AttentionExpected(**joined, head_dim=config.head_dim)

    def budget(rows: slice) -> Tensor:
        cut = {name: getattr(whole, name)[rows] for name in names}
        return budgets.attention(replace(whole, **cut))

    return Bounded(whole.value, budget, config.num_heads)


def _other_sequences(scene: Scene) -> Iterator[Guess]:
    """Every sequence reading the cache of one, or of its neighbour."""
    segments = scene.run.segments
    if len(segments) < 2:
        return
    yield _of_sequence(scene, "sequence 0", lambda index: 0)
    yield _of_sequence(scene, "the sequence before", lambda index: max(index - 1, 0))
    yield _of_sequence(scene, "the sequence after", lambda index: min(index + 1, len(segments) - 1))


def _of_sequence(scene: Scene, words: str, owner: Callable[[int], int]) -> Guess:
    (q, *_), run, config = scene.inputs(), scene.run, scene.config
    parts, defined = [], []
    for index, segment in enumerate(run.segments):
        own = run.keys(scene.layer, index)
        k, v = run.keys(scene.layer, owner(index))
        has_all = segment.first_position + _num_rows(segment) <= len(k)
        if not has_all:
            k, v = own
        change = Change(words)
        part, _ = _attend(q[segment.rows], k, v, segment.first_position, config, change)
        parts.append(part)
        defined.append(torch.full((_num_rows(segment),), has_all))
    return Guess(f"attention to the cache of {words}", _joined(parts, config), torch.cat(defined))


def _num_rows(segment: Segment) -> int:
    return segment.rows.stop - segment.rows.start
