"""Gives each tap of a pass its expected values: a replay, or float64 with its budget.

Knows which operation, weight and inputs belong to a tap, and asks `replay`, `truth` and `budgets`
for the rest. Holds one layer's upcast weights at a time, so that every pass over a group of prompts
shares them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import ModelConfig
from verification import budgets, replay
from verification.oracle import Reference
from verification.passes import Pass
from verification.replay import Replayed
from verification.taps import POINT, source_key
from verification.truth import AttentionExpected, LinearExpected, LinearTruth, attention

SHARED_INPUT = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # linears multiplied as one


@dataclass(frozen=True)
class Bounded:
    """Values in float64 and the budgets of some of their rows."""

    value: Tensor
    budget: Callable[[slice], Tensor]
    num_blocks: int = 1  # parts of a row that may repeat on their own: heads of attention


@dataclass(frozen=True)
class RopeRows:
    """cos and sin by position.

    Args:
        table: bfloat16 [positions, head_dim]: cos, then sin.
        is_own: it is the engine's own; else transformers'.
    """

    table: Tensor
    is_own: bool

    def of(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cos and sin of some positions, each [len(positions), head_dim / 2]."""
        cos, sin = self.table[positions].chunk(2, 1)
        return cos, sin


class LayerTruth:
    """Expected values of one layer's taps."""

    def __init__(
        self, reference: Reference, config: ModelConfig, layer: int, rope: RopeRows
    ) -> None:
        """Takes weights from the bfloat16 model, and cos and sin from `rope`."""
        self._reference = reference
        self._rope = rope
        self._config = config
        self._layer = layer
        self._linears: dict[tuple[str, ...], LinearTruth] = {}
        # By id and tap; each holds its pass, so that no other pass gets that id while it waits.
        self._waiting: dict[tuple[int, str], tuple[Pass, LinearExpected]] = {}

    def expect(self, tap: str, run: Pass) -> Replayed | Bounded:
        """What a tap of this layer should be, given what its operation read in a pass."""
        operation = POINT[tap].operation
        x = [run.inputs[key] for key in self._sources(tap)]
        if operation == "linear":
            result = self._linear(tap, x[0], run)
            return Bounded(result.value, lambda rows: budgets.linear(_linear_rows(result, rows)))
        if operation == "attention":
            return self._attention(x[0], run)
        if operation == "rms_norm":
            weight = self._weight(tap)
            rows = x[0][run.logit_rows] if tap == "final_norm" else x[0]
            return replay.rms_norm(rows, weight, self._config.rms_norm_eps)
        if operation == "rotary_embedding":
            if not self._rope.is_own:
                return self.expect_of_transformers(tap, run)
            cos, sin = self._rope.of(run.positions)
            return replay.rotary_embedding(x[0], cos, sin, self._config.head_dim)
        if operation == "silu_and_mul":
            return replay.silu_and_mul(*x)
        if operation == "residual_add":
            return replay.residual_add(*x)
        assert operation == "embedding"
        return replay.embedding(self._weight(tap), run.token_ids)

    def expect_of_transformers(self, tap: str, run: Pass) -> Replayed:
        """What RoPE gives with transformers' table, or with one that may be as right."""
        x = run.inputs[self._sources(tap)[0]]
        cos, sin = self._reference.rope_table(run.positions.tolist())
        tables = replay.possible_tables(run.positions, self._reference.inv_freq())
        return replay.rotary_embedding(x, cos, sin, self._config.head_dim, tables)

    def _sources(self, tap: str) -> list[tuple[str, int]]:
        num_layers = self._config.num_layers
        return [source_key(name, self._layer, num_layers, tap) for name in POINT[tap].inputs]

    def _weight(self, tap: str) -> Tensor:
        return self._reference.weight(POINT[tap].weight(self._layer))

    def _linear(self, tap: str, x: Tensor, run: Pass) -> LinearExpected:
        """One multiplication serves all that read the same input; the others' results wait."""
        waiting = self._waiting.pop((id(run), tap), None)
        if waiting is not None:
            return waiting[1]
        together = next(names for names in SHARED_INPUT if tap in names)
        if together not in self._linears:
            self._linears[together] = LinearTruth([self._weight(name) for name in together])
        results = dict(zip(together, self._linears[together](x), strict=True))
        for name in together[together.index(tap) + 1 :]:
            self._waiting[id(run), name] = (run, results[name])
        return results[tap]

    def _attention(self, q: Tensor, run: Pass) -> Bounded:
        parts = []
        for index, segment in enumerate(run.segments):
            k, v = run.keys(self._layer, index)
            first = segment.first_position
            parts.append(attention(q[segment.rows], k, v, first, self._config.head_dim))
        fields = ("value", "mean_magnitude", "spread", "score_condition", "num_tiles")
        joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in fields}

        def budget(rows: slice) -> Tensor:
            cut = {name: tensor[rows] for name, tensor in joined.items()}
            return budgets.attention(AttentionExpected(**cut, head_dim=self._config.head_dim))

        return Bounded(joined["value"], budget, self._config.num_heads)


LOGITS_AT_ONCE = 8192  # ids; a whole lm_head in float64 may not fit


def logits_truths(reference: Reference) -> Iterator[tuple[slice, LinearTruth]]:
    """The lm_head, a slice of the vocabulary at a time, with the ids it covers."""
    weight = reference.weight(POINT["logits"].weight(0))
    for start in range(0, len(weight), LOGITS_AT_ONCE):
        ids = slice(start, min(start + LOGITS_AT_ONCE, len(weight)))
        yield ids, LinearTruth([weight[ids]])


def expected_logits(truth: LinearTruth, x: Tensor) -> Bounded:
    """Logits of final_norm rows."""
    (result,) = truth(x)
    return Bounded(result.value, _logits_budget(result))


def _logits_budget(result: LinearExpected) -> Callable[[slice], Tensor]:
    return lambda rows: budgets.linear_f32(_linear_rows(result, rows))


def _linear_rows(result: LinearExpected, rows: slice) -> LinearExpected:
    return LinearExpected(result.value[rows], result.condition[rows], result.in_features)
