"""Turn the sampling state of a step's rows into the arrays that C takes.

Holds, per sequence, the tokens that its penalties count, kept up to date token by token; all of it
follows from parameters and token ids alone, so it can be made again at any time. Knows nothing of
devices, of C, or of other sequences.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from engine.errors import InvalidArgument
from engine.sampling_params import MAX_LOGPROBS, SamplingParams

NO_LOGPROBS = -1  # EngineSamplingRow.num_logprobs of a row whose logprobs nobody asked for
DRAWN = -1  # EngineSamplingRow.scored_id: the token that the step chooses is the one scored

# The C structs EngineSamplingRow and EngineLogitEdit of csrc/include/engine.h.
ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("position", np.int32),
        ("choice", np.int32),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("top_k", np.int32),
        ("repetition_penalty", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("num_logprobs", np.int32),
        ("scored_id", np.int32),
        ("first_edit", np.int32),
        ("num_edits", np.int32),
    ],
    align=True,
)
EDIT = np.dtype(
    [("token_id", np.int32), ("count", np.int32), ("bias", np.float32), ("flags", np.int32)]
)
EDIT_SEEN = 1  # the token is in the prompt or the answer: repetition_penalty applies
EDIT_BANNED = 2  # the token cannot be chosen
TOKEN_ID, COUNT, BIAS, FLAGS = range(len(EDIT))  # columns of edits as int32
_FIRST_ROOM = 16  # edits; doubles when full
_PARAMS = (
    "temperature",
    "top_p",
    "min_p",
    "top_k",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def _row(**values: float) -> bytes:
    """One ROW: greedy, unscored, but for the values given."""
    neutral = {
        "top_p": 1,
        "repetition_penalty": 1,
        "num_logprobs": NO_LOGPROBS,
        "scored_id": DRAWN,
    }
    row = np.zeros((), ROW)
    for name, value in (neutral | values).items():
        row[name] = value
    return row.tobytes()


@dataclass(frozen=True)
class SamplingBatch:
    """What a step's sampling needs, one row per row of logits, in their order."""

    rows: np.ndarray  # [num_logits] ROW
    edits: np.ndarray  # EDIT, each row's num_edits from its first_edit on
    max_logprobs: int | None  # most alternatives of any row; None: no row asks for logprobs


@dataclass(frozen=True)
class Logprobs:
    """Natural log-probabilities from a step's unmodified logits.

    Rows that did not ask hold NaN and rank or id -1, and so do alternatives beyond a row's number.
    """

    token_logprobs: np.ndarray  # [num_logits] float32: of the chosen, or of the scored token
    token_ranks: np.ndarray  # [num_logits] int32: 1 is the arg-max
    top_ids: np.ndarray  # [num_logits, max_logprobs] int32, the most likely first
    top_logprobs: np.ndarray  # [num_logits, max_logprobs] float32

    @classmethod
    def empty(cls, num_logits: int, max_logprobs: int) -> "Logprobs":
        """Arrays for a step to fill."""
        return cls(
            token_logprobs=np.full(num_logits, np.nan, np.float32),
            token_ranks=np.full(num_logits, -1, np.int32),
            top_ids=np.full((num_logits, max_logprobs), -1, np.int32),
            top_logprobs=np.full((num_logits, max_logprobs), np.nan, np.float32),
        )


class SequenceSampler:
    """How one sequence's next token is chosen: parameters, seed, and the tokens so far.

    Args:
        params: of the request.
        prompt_ids: the prompt, at least one token.
        seed: of the request, 0 .. 2^64 - 1; with the position and `choice` it decides the draw.
        choice: which of the request's n answers this is, from 0.
        eos_token_ids: the model's end tokens; banned until min_tokens, unless ignore_eos.
        output_ids: the answer so far, where it did not start here (after a preemption, a restart).
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        seed: int,
        choice: int = 0,
        eos_token_ids: Iterable[int] = (),
        output_ids: Iterable[int] = (),
    ) -> None:
        if len(prompt_ids) == 0:
            raise InvalidArgument("prompt must have at least 1 token, got 0")
        self.params = params
        self.position = len(prompt_ids)  # of the next token
        self._places: dict[int, int] = {}  # token id -> its row of _edits
        self._edits = np.zeros((_FIRST_ROOM, len(EDIT)), np.int32)
        for token_id, bias in (params.logit_bias or {}).items():
            place = self._edit(token_id)
            self._edits[place, BIAS] = np.float32(bias).view(np.int32)
        end_ids = set(params.stop_token_ids) | set(() if params.ignore_eos else eos_token_ids)
        # Tokens of prompt and answer from which on the ends are allowed; None: they are.
        self.ban_end: int | None = None
        if params.min_tokens > 0 and end_ids:
            self.ban_end = len(prompt_ids) + params.min_tokens
            for token_id in sorted(end_ids):
                self._flag(token_id, EDIT_BANNED)
        if params.repetition_penalty != 1:
            for token_id in dict.fromkeys(prompt_ids):
                self._flag(token_id, EDIT_SEEN)
        self.row = _row(  # but for its position and num_edits
            seed=seed,
            choice=choice,
            num_logprobs=NO_LOGPROBS if params.logprobs is None else params.logprobs,
            **{name: getattr(params, name) for name in _PARAMS},
        )
        for token_id in output_ids:
            self.append(token_id)

    @property
    def edits(self) -> np.ndarray:
        """The logits that change before the choice, [num_edits, 4] int32: EDIT's bytes."""
        return self._edits[: self.num_edits]

    @property
    def num_edits(self) -> int:
        """How many logits change."""
        return len(self._places)

    @property
    def is_plain(self) -> bool:
        """Whether the arg-max of the unmodified logits is all that is asked."""
        return self.params.temperature == 0 and self.params.logprobs is None and not self._places

    def append(self, token_id: int) -> None:
        """Take note of the answer's next token; while it runs, `EditTable` does."""
        self.position += 1
        if self.params.has_penalties:
            place = self._flag(token_id, EDIT_SEEN)
            self._edits[place, COUNT] += 1
        if self.position == self.ban_end:
            self._edits[: self.num_edits, FLAGS] &= ~EDIT_BANNED
            self.ban_end = None

    def _edit(self, token_id: int) -> int:
        """The token's row of _edits, made where it has none."""
        place = self._places.setdefault(token_id, len(self._places))
        if place == len(self._edits):
            self._edits = np.concatenate([self._edits, np.zeros_like(self._edits)])
        self._edits[place, TOKEN_ID] = token_id
        return place

    def _flag(self, token_id: int, flag: int) -> int:
        place = self._edit(token_id)
        self._edits[place, FLAGS] |= flag
        return place


@dataclass(frozen=True)
class PromptToken:
    """A row of a prompt, of which only the score of the token that follows it is wanted.

    Args:
        token_id: the prompt's next token.
        num_logprobs: alternatives, 0 .. MAX_LOGPROBS.
    """

    token_id: int
    num_logprobs: int

    is_plain: ClassVar[bool] = False
    position: ClassVar[int] = 0
    num_edits: ClassVar[int] = 0

    def __post_init__(self) -> None:
        """Refuse what the arrays have no room for."""
        if not 0 <= self.num_logprobs <= MAX_LOGPROBS:
            raise InvalidArgument(
                f"num_logprobs must be from 0 to {MAX_LOGPROBS}, got {self.num_logprobs}"
            )

    @property
    def row(self) -> bytes:
        """A greedy ROW that scores the token."""
        return _row(scored_id=self.token_id, num_logprobs=self.num_logprobs)


class IgnoredRow:
    """A row of logits whose token nobody looks at."""

    is_plain = True
    position = 0
    num_edits = 0
    row = _row()


def build_sampling(
    rows: Sequence[SequenceSampler | PromptToken | IgnoredRow],
) -> SamplingBatch | None:
    """The sampling arrays of a step.

    Args:
        rows: one per row of logits, in their order.

    Returns:
        The arrays, or None where every row's arg-max is all that is asked.
    """
    if all([row.is_plain for row in rows]):
        return None
    stacked = np.frombuffer(bytearray(b"".join([row.row for row in rows])), ROW)
    stacked["position"] = [row.position for row in rows]
    stacked["num_edits"] = num_edits = [row.num_edits for row in rows]
    stacked["first_edit"] = np.cumsum([0, *num_edits[:-1]])
    edits = [row.edits for row in rows if row.num_edits]
    return SamplingBatch(
        stacked,
        np.concatenate(edits).view(EDIT)[:, 0] if edits else _NO_EDITS,
        most_logprobs(stacked),
    )


def spread(
    sampling: SamplingBatch | None,
    places: np.ndarray,
    num_logits: int,
    scored: Mapping[int, PromptToken],
) -> SamplingBatch | None:
    """The sampling arrays of a step in which only some rows of logits are sampled.

    Args:
        sampling: of those; None: by arg-max.
        places: which they are, [num_sampled].
        num_logits: rows of logits of the step.
        scored: rows of prompts by their place; whatever is chosen for the others is ignored.

    Returns:
        The arrays, or None where no row asks for more than its arg-max.
    """
    if sampling is None and not scored:
        return None
    rows = np.frombuffer(bytearray(IgnoredRow.row * num_logits), ROW)
    if sampling is not None:
        rows[places] = sampling.rows
    for place, token in scored.items():
        rows[place] = np.frombuffer(token.row, ROW)[0]
    return SamplingBatch(
        rows, _NO_EDITS if sampling is None else sampling.edits, most_logprobs(rows)
    )


def most_logprobs(rows: np.ndarray) -> int | None:
    """Of ROW's alternatives, the most; None: no row asks for logprobs."""
    most = int(rows["num_logprobs"].max())
    return None if most == NO_LOGPROBS else most


_NO_EDITS = np.zeros(0, EDIT)
