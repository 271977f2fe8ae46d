// index.c -- a step's index arrays: gathered on the host, brought to the backend in one copy.

#include <string.h>
#include "engine_state.h"

size_t index_values(const EngineOptions *o) {
    size_t max_blocks = ((size_t)o->max_seq_len + o->block_size - 1) / o->block_size;
    size_t of_tokens = 4 * (size_t)o->max_num_tokens;
    size_t of_seqs = 3 * (size_t)o->max_num_seqs + 1 + o->max_num_seqs * max_blocks;
    return of_tokens + of_seqs + 3 * MAX_WANTED + 1 + MAX_WANTED * max_blocks;
}

// The staging memory as it fills: where an array begins on the host, and where it will be on the device.
typedef struct Staging {
    int32_t *host;
    const int32_t *device;
    size_t used;
} Staging;

// Room for an array; returns where it will be on the device.
static const int32_t *reserve(Staging *staging, size_t count, int32_t **host) {
    const int32_t *device = staging->device + staging->used;
    *host = staging->host + staging->used;
    staging->used += count;
    return device;
}

static const int32_t *stage(Staging *staging, const int32_t *values, size_t count) {
    int32_t *host;
    const int32_t *device = reserve(staging, count, &host);
    memcpy(host, values, count * sizeof(int32_t));
    return device;
}

// A row at position p of a sequence attends to what a sequence of p + 1 tokens would.
static void stage_wanted(Staging *staging, const EngineBatch *b, BatchIndex *wanted) {
    int num_rows = b->num_logits, sequence = 0;
    int32_t *counted, *positions, *seq_lens, *block_tables;
    *wanted = (BatchIndex){.num_tokens = num_rows,
                           .num_seqs = num_rows,
                           .max_blocks_per_seq = b->max_blocks_per_seq,
                           .num_logits = num_rows,
                           .max_seq_len_q = 1};
    wanted->cu_seqlens_q = wanted->logits_indices = reserve(staging, (size_t)num_rows + 1, &counted);
    wanted->positions = reserve(staging, (size_t)num_rows, &positions);
    wanted->seq_lens = reserve(staging, (size_t)num_rows, &seq_lens);
    wanted->block_tables =
        reserve(staging, (size_t)num_rows * (size_t)b->max_blocks_per_seq, &block_tables);
    counted[0] = 0;
    for (int i = 0; i < num_rows; i++) {
        int token = b->logits_indices[i];
        while (b->cu_seqlens_q[sequence + 1] <= token) sequence++;
        counted[i + 1] = i + 1;
        positions[i] = b->positions[token];
        seq_lens[i] = positions[i] + 1;
        if (seq_lens[i] > wanted->max_seq_len) wanted->max_seq_len = seq_lens[i];
        memcpy(block_tables + (size_t)i * b->max_blocks_per_seq,
               b->block_tables + (size_t)sequence * b->max_blocks_per_seq,
               (size_t)b->max_blocks_per_seq * sizeof(int32_t));
    }
}

Status index_of_batch(Engine *e, const EngineBatch *b, BatchIndex *index) {
    Staging staging = {e->index_host, e->index_device, 0};
    size_t tokens = (size_t)b->num_tokens, seqs = (size_t)b->num_seqs;
    *index = (BatchIndex){.num_tokens = b->num_tokens,
                          .num_seqs = b->num_seqs,
                          .max_blocks_per_seq = b->max_blocks_per_seq,
                          .num_logits = b->num_logits};
    for (int i = 0; i < b->num_seqs; i++) {
        int seq_len_q = b->cu_seqlens_q[i + 1] - b->cu_seqlens_q[i];
        if (seq_len_q > index->max_seq_len_q) index->max_seq_len_q = seq_len_q;
        if (b->seq_lens[i] > index->max_seq_len) index->max_seq_len = b->seq_lens[i];
    }
    index->input_ids = stage(&staging, b->input_ids, tokens);
    index->positions = stage(&staging, b->positions, tokens);
    index->slot_mapping = stage(&staging, b->slot_mapping, tokens);
    index->cu_seqlens_q = stage(&staging, b->cu_seqlens_q, seqs + 1);
    index->seq_lens = stage(&staging, b->seq_lens, seqs);
    index->block_tables = stage(&staging, b->block_tables, seqs * (size_t)b->max_blocks_per_seq);
    if (b->num_logits) index->logits_indices = stage(&staging, b->logits_indices, (size_t)b->num_logits);
    if (b->num_logits < b->num_tokens && b->num_logits <= MAX_WANTED) {
        stage_wanted(&staging, b, &e->wanted);
        index->wanted = &e->wanted;
    }
    int32_t *prefill_seqs;
    index->prefill_seqs = reserve(&staging, seqs, &prefill_seqs);
    index->num_prefill_seqs = batch_prefill_seqs(b, prefill_seqs);
    return e->model.kernels->copy_in(e->index_device, e->index_host, staging.used * sizeof(int32_t),
                                     e->model.stream);
}
