"""One sequence: a prompt and the answer that grows behind it.

Holds token ids, blocks and progress; decides nothing. Invariant: while it runs, the newest tokens
are in its row of the running batch (`row` is not None); otherwise `token_ids` has them all.
"""

from dataclasses import dataclass, field
from typing import Literal

from engine.sampling import SequenceSampler

# A request of priority p queues as one that arrived p * PRIORITY_STEP requests later: whoever waits
# is overtaken by a bounded number, so no priority can starve another.
PRIORITY_STEP = 1000

FinishReason = Literal["stop", "length", "abort"]


@dataclass(eq=False)
class Sequence:
    """One of the n answers to a request.

    Args:
        request_id: the request's name.
        token_ids: the prompt, and what was sampled before it last left the running batch.
        max_num_tokens: prompt and longest answer, together.
        index: which of the request's answers, 0 .. n - 1.
        arrival: number of the request in order of arrival.
        priority: lower runs earlier.
        min_num_tokens: no stop token counts before prompt and answer are longer than this.
        ignore_eos: the model's own end tokens do not end it.
        stop_token_ids: further tokens that end it.
        wants_prompt_logits: the logits of every prompt token are wanted, so all are computed.
        is_watched: whether somebody looks at every token as it comes.
        is_sampled: the arg-max of its logits is not all that is asked.
        is_edited: penalties, a bias or a ban change its logits.
        sampler: how its next token is chosen; None: by arg-max.
        followers: sequences of the same prompt that start once this one's is computed.
    """

    request_id: str
    token_ids: list[int]
    max_num_tokens: int
    index: int = 0
    arrival: int = 0
    priority: int = 0
    min_num_tokens: int = 0
    ignore_eos: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    wants_prompt_logits: bool = False
    is_watched: bool = False
    is_sampled: bool = False
    is_edited: bool = False
    sampler: SequenceSampler | None = None
    followers: list["Sequence"] = field(default_factory=list)

    block_table: list[int] = field(default_factory=list)
    row: int | None = None  # in the running batch
    num_cached_tokens: int = 0  # of the prompt, found computed when it first ran
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string, if not an end token

    def __post_init__(self) -> None:
        """Remember where the prompt ends."""
        self.num_prompt_tokens = len(self.token_ids)

    @property
    def order(self) -> tuple[int, int, int]:
        """Who goes first: smaller earlier, total, and fixed for life."""
        return (self.arrival + self.priority * PRIORITY_STEP, self.arrival, self.index)

    @property
    def is_finished(self) -> bool:
        """Whether no further token will come."""
        return self.finish_reason is not None

    def finish(self, reason: FinishReason, stop_reason: int | str | None = None) -> None:
        """Write down why it ended."""
        self.finish_reason, self.stop_reason = reason, stop_reason
