"""Lay a step's sampling out as the C struct EngineSampling.

Knows the struct's fields and the arrays that they point into; decides nothing.
"""

from typing import Protocol

import numpy as np

from engine.sampling import EDIT, ROW, Logprobs, SamplingBatch


class Pointers(Protocol):
    """The part of `engine.bindings.Library` that is needed here."""

    ffi: object

    def array(
        self, values: np.ndarray, c_type: str, dtype: type, name: str, shape: tuple[int, ...]
    ) -> object:
        """A C pointer into an array of this dtype and shape."""
        ...


def fill_sampling(
    library: Pointers, sampling: SamplingBatch, logprobs: Logprobs | None, num_rows: int
) -> object:
    """The C struct of a step's sampling; the arrays must outlive it.

    Args:
        library: makes the pointers.
        sampling: one row per row of logits.
        logprobs: where the scores go; None where no row asks for any.
        num_rows: rows of logits.

    Raises:
        InvalidArgument: an array's shape is not what the step implies.
    """
    edits = sampling.edits
    struct = library.ffi.new("EngineSampling *")
    struct.rows = library.array(
        sampling.rows, "EngineSamplingRow", ROW, "sampling.rows", (num_rows,)
    )
    struct.num_edits = len(edits)
    struct.edits = library.array(edits, "EngineLogitEdit", EDIT, "sampling.edits", (len(edits),))
    if logprobs is None:
        return struct
    width = logprobs.top_ids.shape[-1]
    struct.max_logprobs = width
    for name, c_type, dtype, shape in (
        ("token_logprobs", "float", np.float32, (num_rows,)),
        ("token_ranks", "int32_t", np.int32, (num_rows,)),
        ("top_ids", "int32_t", np.int32, (num_rows, width)),
        ("top_logprobs", "float", np.float32, (num_rows, width)),
    ):
        array = library.array(getattr(logprobs, name), c_type, dtype, name, shape)
        setattr(struct, name, array)
    return struct
