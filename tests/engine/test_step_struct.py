"""A struct kept from step to step says of each step what a new one would."""

from dataclasses import replace

import numpy as np
import pytest

from engine.batch import Batch, SequenceSlice, build_batch
from engine.errors import InvalidArgument
from engine.sampling import Logprobs, SequenceSampler, build_sampling
from engine.sampling_params import SamplingParams
from engine.step_struct import StepStruct

VOCAB = 11


def batch(count: int = 2) -> Batch:
    return build_batch([SequenceSlice([i], 3, [i]) for i in range(count)], block_size=16)


def sampling(count: int, **params):
    state = [SequenceSampler(SamplingParams(**params), [1, 2], seed=i) for i in range(count)]
    return build_sampling(state)


def says(library, struct) -> dict[str, object]:
    """What C would read."""
    null = library.ffi.NULL
    number = struct.num_seqs
    return {
        "sizes": (struct.num_tokens, number, struct.max_blocks_per_seq, struct.num_logits),
        "input_ids": [struct.input_ids[i] for i in range(number)],
        "seq_lens": [struct.seq_lens[i] for i in range(number)],
        "wants": [struct.logits != null, struct.next_ids != null, struct.sampling != null],
        "seeds": struct.sampling != null and [struct.sampling.rows[i].seed for i in range(number)],
        "scores": struct.sampling != null and struct.sampling.token_ranks != null,
    }


def test_a_struct_used_again_says_what_a_new_one_would(library):
    kept = StepStruct(library, VOCAB)
    ids, logits = np.zeros(2, np.int32), np.zeros((2, VOCAB), np.float32)
    first, drawn, scored = batch(), sampling(2), sampling(2, logprobs=1)
    one = batch(1)
    for arguments in (
        (first, logits, ids, drawn, None),
        (first, None, ids, drawn, None),
        (first, None, ids, scored, Logprobs.empty(2, 1)),
        (first, None, ids, drawn, None),
        (first, None, ids, drawn, Logprobs.empty(2, 0)),
        (first, None, None, None, None),
        (one, None, ids[:1], sampling(1), None),
        (first, logits, None, sampling(2, top_k=3), None),
    ):
        struct, _owed = kept.fill(*arguments)
        new, _owed_too = StepStruct(library, VOCAB).fill(*arguments)

        assert says(library, struct) == says(library, new)


def test_scores_go_to_the_arrays_of_this_step(library):
    kept, first, scored = StepStruct(library, VOCAB), batch(), sampling(2, logprobs=1)
    for _ in range(2):
        logprobs = Logprobs.empty(2, 1)

        struct, _owed = kept.fill(first, None, None, scored, logprobs)

        struct.sampling.token_ranks[1] = 5
        assert logprobs.token_ranks.tolist() == [-1, 5]


def test_arrays_changed_in_place_are_seen(library):
    kept, first = StepStruct(library, VOCAB), batch()
    kept.fill(first, None, None, None, None)
    first.input_ids[:] = [8, 9]

    struct, _owed = kept.fill(first, None, None, None, None)

    assert [struct.input_ids[i] for i in range(2)] == [8, 9]


def test_what_a_step_owes_outlives_the_next_fill(library):
    kept, first = StepStruct(library, VOCAB), batch()
    struct, owed = kept.fill(first, None, None, sampling(2), None)
    pointer = struct.sampling

    kept.fill(first, None, None, sampling(2, top_k=3), None)

    assert owed[-1] == pointer  # whoever holds it keeps what C still reads


@pytest.mark.parametrize(
    ("field", "wrong", "names"),
    [
        ("next_ids", np.zeros(3, np.int32), "next_ids"),
        ("logits", np.zeros((2, 5), np.float32), "logits"),
        ("sampling", sampling(1), "sampling.rows"),
    ],
)
def test_a_wrong_shape_is_named_and_the_next_step_is_right(library, field, wrong, names):
    kept, first = StepStruct(library, VOCAB), batch()
    arguments = {"logits": None, "next_ids": None, "sampling": None, "logprobs": None}

    with pytest.raises(InvalidArgument, match=names):
        kept.fill(first, **(arguments | {field: wrong}))
    with pytest.raises(InvalidArgument, match="positions"):
        kept.fill(replace(first, positions=np.zeros(5, np.int32)), **arguments)

    struct, _owed = kept.fill(first, **arguments)
    assert says(library, struct)["wants"] == [False, False, False]
    assert [struct.positions[i] for i in range(2)] == [3, 3]
