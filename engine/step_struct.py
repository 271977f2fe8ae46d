"""Lay a step out as the C struct EngineBatch.

Knows the struct's fields and the arrays that they point into; decides nothing. What it says of a
batch is made once for it: most steps of serving are the batch of the step before, its arrays
changed in place.
"""

import numpy as np

from engine.batch import Batch
from engine.sampling import Logprobs, SamplingBatch
from engine.sampling_struct import Pointers, fill_sampling


def fill_batch(library: Pointers, batch: Batch) -> object:
    """The C struct of a step's index arrays; `batch` must outlive it.

    Raises:
        InvalidArgument: an array's length is not what the others imply.
    """
    num_tokens, num_seqs = len(batch.input_ids), len(batch.seq_lens)
    shapes = {
        "input_ids": (num_tokens,),
        "positions": (num_tokens,),
        "slot_mapping": (num_tokens,),
        "cu_seqlens_q": (num_seqs + 1,),
        "seq_lens": (num_seqs,),
        "block_tables": (num_seqs, batch.block_tables.shape[-1]),
        "logits_indices": (len(batch.logits_indices),),
    }
    struct = library.ffi.new("EngineBatch *")
    struct.num_tokens, struct.num_seqs = num_tokens, num_seqs
    struct.max_blocks_per_seq = batch.block_tables.shape[-1]
    struct.num_logits = len(batch.logits_indices)
    for name, shape in shapes.items():
        array = library.array(getattr(batch, name), "int32_t", np.int32, name, shape)
        setattr(struct, name, array)
    return struct


class StepStruct:
    """The C struct of one step after another.

    Args:
        library: makes the pointers.
        vocab_size: columns of logits.
    """

    def __init__(self, library: Pointers, vocab_size: int) -> None:
        self._library = library
        self._vocab_size = vocab_size
        self._batch: Batch | None = None
        self._struct: object = None
        self._sampling: SamplingBatch | None = None
        self._sampling_struct: object = None

    def fill(
        self,
        batch: Batch,
        logits: np.ndarray | None,
        next_ids: np.ndarray | None,
        sampling: SamplingBatch | None,
        logprobs: Logprobs | None,
    ) -> tuple[object, tuple[object, ...]]:
        """The struct of this step, good until the next call, and what must live until it has ended.

        Args:
            batch: the step's sequences.
            logits, next_ids, logprobs: to be written, or None.
            sampling: how tokens are chosen; None: by arg-max.

        Raises:
            InvalidArgument: an array has not the shape that the batch implies.
        """
        array, num_logits = self._library.array, len(batch.logits_indices)
        if batch is not self._batch:
            self._struct, self._batch = fill_batch(self._library, batch), batch
        struct, null = self._struct, self._library.ffi.NULL
        struct.sampling = struct.logits = struct.next_ids = null
        if sampling is not None:
            struct.sampling = self._fill_sampling(sampling, logprobs, num_logits)
        if logits is not None:
            shape = (num_logits, self._vocab_size)
            struct.logits = array(logits, "float", np.float32, "logits", shape)
        if next_ids is not None:
            struct.next_ids = array(next_ids, "int32_t", np.int32, "next_ids", (num_logits,))
        return struct, (logits, next_ids, sampling, logprobs, self._sampling_struct)

    def _fill_sampling(
        self, sampling: SamplingBatch, logprobs: Logprobs | None, num_logits: int
    ) -> object:
        if sampling is not self._sampling or logprobs is not None:
            self._sampling = None
            self._sampling_struct = fill_sampling(self._library, sampling, logprobs, num_logits)
            self._sampling = sampling if logprobs is None else None
        return self._sampling_struct
