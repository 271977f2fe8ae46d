// batch.h -- the door: every precondition of a step is checked here, once, before any work.

#pragma once
#include "../model/model.h"

// What a batch is checked against.
typedef struct BatchLimits {
    int vocab_size;
    int block_size;
    int num_blocks;
    int max_seq_len;
    int max_num_tokens;
    int max_num_seqs;
} BatchLimits;

// `slot_owner` is the caller's scratch, [num_blocks * block_size], zeroed once; `step` a number that grows
// by one with every call, so that the scratch need not be cleared.
// `extra_tokens`: tokens by which every sequence will grow after this step, for which its blocks must
// suffice.
Status batch_check(const EngineBatch *batch, const BatchLimits *limits, int extra_tokens,
                   uint32_t *slot_owner, uint32_t step);

// Sequences of more than one new token into `seqs`, [num_seqs]; returns how many.
int batch_prefill_seqs(const EngineBatch *batch, int32_t *seqs);

// `edited_by` is the caller's scratch, [vocab_size] (sampling.c).
Status sampling_check(const EngineSampling *sampling, int num_rows, int vocab_size, uint8_t *edited_by);
