"""What the engine was run on and what it gave: one Pass per mode and phase, ready to be graded.

Holds tensors and which prompt each row belongs to; decides nothing. Invariant: row i of every tap
of a pass belongs to the segment whose rows contain i, final_norm and logits to the one whose
logit_rows do.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from verification.oracle import Trace

LOCAL, ACCUMULATED = "local", "accumulated"
PREFILL, DECODE = "prefill", "decode"
UNTAPPED = "untapped"  # both once more as they are served: operations may be fused


@dataclass(frozen=True)
class Segment:
    """The rows of one prompt in a pass."""

    prompt: str
    rows: slice
    logit_rows: slice  # of final_norm and logits
    first_position: int

    @property
    def num_rows(self) -> int:
        """Tokens of this prompt in the pass."""
        return self.rows.stop - self.rows.start

    def rows_of(self, tap: str) -> slice:
        """Its rows of a tap."""
        return self.logit_rows if tap in ("final_norm", "logits") else self.rows


@dataclass(frozen=True)
class Pass:
    """One run of the engine over a group of prompts.

    Args:
        mode: LOCAL (every operation was fed the yardstick's values) or ACCUMULATED (its own).
        phase: PREFILL or DECODE.
        segments: the prompts, in row order.
        token_ids, positions: int64 [rows].
        logit_rows: the row of the pass behind each row of final_norm and logits, int64.
        inputs: what the operations read.
        outputs: what the engine computed.
        keys: (layer, segment index) -> K and V of all positions up to the segment's last.
        reference: transformers' own values for the same inputs; LOCAL only.
        twin: the values of the prefill pass at the same rows, where equal bits are promised; DECODE
            only.
    """

    mode: str
    phase: str
    segments: tuple[Segment, ...]
    token_ids: Tensor
    positions: Tensor
    logit_rows: Tensor
    inputs: Trace
    outputs: Trace
    keys: Callable[[int, int], tuple[Tensor, Tensor]]
    reference: Trace | None = None
    twin: Trace | None = None
