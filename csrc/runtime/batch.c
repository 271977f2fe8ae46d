// batch.c -- lengths, ids, slots, duplicates, capacity: a bad batch is refused by field, limit and value.

#include "batch.h"

static Status check_counts(const EngineBatch *b, const BatchLimits *limits) {
    if (b->num_tokens < 1 || b->num_tokens > limits->max_num_tokens)
        return fail(STATUS_INVALID_ARGUMENT, "num_tokens is %d, must be 1 .. %d (max_num_tokens)",
                    b->num_tokens, limits->max_num_tokens);
    if (b->num_seqs < 1 || b->num_seqs > limits->max_num_seqs)
        return fail(STATUS_INVALID_ARGUMENT, "num_seqs is %d, must be 1 .. %d (max_num_seqs)", b->num_seqs,
                    limits->max_num_seqs);
    if (b->num_logits < 0 || b->num_logits > b->num_tokens)
        return fail(STATUS_INVALID_ARGUMENT, "num_logits is %d, must be 0 .. %d (num_tokens)",
                    b->num_logits, b->num_tokens);
    int most_blocks = (limits->max_seq_len + limits->block_size - 1) / limits->block_size;
    if (b->max_blocks_per_seq < 1 || b->max_blocks_per_seq > most_blocks)
        return fail(STATUS_INVALID_ARGUMENT, "max_blocks_per_seq is %d, must be 1 .. %d (max_seq_len %d)",
                    b->max_blocks_per_seq, most_blocks, limits->max_seq_len);
    if (!b->input_ids || !b->positions || !b->slot_mapping || !b->cu_seqlens_q || !b->seq_lens ||
        !b->block_tables)
        return fail(STATUS_INVALID_ARGUMENT, "an index array of the batch is null");
    if (b->num_logits > 0 && !b->logits_indices)
        return fail(STATUS_INVALID_ARGUMENT, "logits_indices is null, but num_logits is %d", b->num_logits);
    return STATUS_OK;
}

static Status check_sequence(const EngineBatch *b, const BatchLimits *limits, int extra_tokens,
                             int sequence) {
    int first = b->cu_seqlens_q[sequence], end = b->cu_seqlens_q[sequence + 1];
    int seq_len = b->seq_lens[sequence];
    if (end <= first || end > b->num_tokens)
        return fail(STATUS_INVALID_ARGUMENT,
                    "cu_seqlens_q[%d] is %d after %d: must grow and stay within %d", sequence + 1, end,
                    first, b->num_tokens);
    int longest = limits->max_seq_len - extra_tokens;  // now, so that the tokens to come still fit
    if (seq_len < end - first || seq_len > longest)
        return fail(STATUS_INVALID_ARGUMENT,
                    "seq_lens[%d] is %d, must be %d (its new tokens) .. %d (max_seq_len%s)", sequence,
                    seq_len, end - first, longest, extra_tokens ? " less the tokens to come" : "");
    int num_blocks = (seq_len + extra_tokens + limits->block_size - 1) / limits->block_size;
    if (num_blocks > b->max_blocks_per_seq)
        return fail(STATUS_INVALID_ARGUMENT,
                    "seq_lens[%d] is %d and needs %d blocks%s, but max_blocks_per_seq is %d", sequence,
                    seq_len, num_blocks, extra_tokens ? " with the tokens to come" : "",
                    b->max_blocks_per_seq);
    const int32_t *table = b->block_tables + (size_t)sequence * b->max_blocks_per_seq;
    for (int i = 0; i < num_blocks; i++)
        if (table[i] < 0 || table[i] >= limits->num_blocks)
            return fail(STATUS_INVALID_ARGUMENT, "block_tables[%d][%d] is %d, but the cache has %d blocks",
                        sequence, i, table[i], limits->num_blocks);
    for (int token = first; token < end; token++) {
        int position = seq_len - (end - token);
        if (b->positions[token] != position)
            return fail(STATUS_INVALID_ARGUMENT,
                        "positions[%d] is %d, but token %d of sequence %d is at %d", token,
                        b->positions[token], token - first, sequence, position);
        int slot =
            table[position / limits->block_size] * limits->block_size + position % limits->block_size;
        if (b->slot_mapping[token] != slot)
            return fail(STATUS_INVALID_ARGUMENT,
                        "slot_mapping[%d] is %d, but position %d of sequence %d is slot %d", token,
                        b->slot_mapping[token], position, sequence, slot);
    }
    return STATUS_OK;
}

// Slots of the tokens that come after this step's.
static Status claim_later_slots(const EngineBatch *b, const BatchLimits *limits, int extra_tokens,
                                uint32_t *slot_owner, uint32_t step) {
    for (int sequence = 0; sequence < b->num_seqs; sequence++) {
        const int32_t *table = b->block_tables + (size_t)sequence * b->max_blocks_per_seq;
        for (int i = 0; i < extra_tokens; i++) {
            int position = b->seq_lens[sequence] + i;
            int slot =
                table[position / limits->block_size] * limits->block_size + position % limits->block_size;
            if (slot_owner[slot] == step)
                return fail(
                    STATUS_INVALID_ARGUMENT,
                    "block_tables: position %d of sequence %d is slot %d, which this call writes twice",
                    position, sequence, slot);
            slot_owner[slot] = step;
        }
    }
    return STATUS_OK;
}

Status batch_check(const EngineBatch *b, const BatchLimits *limits, int extra_tokens, uint32_t *slot_owner,
                   uint32_t step) {
    TRY(check_counts(b, limits));
    if (b->cu_seqlens_q[0] != 0)
        return fail(STATUS_INVALID_ARGUMENT, "cu_seqlens_q[0] is %d, must be 0", b->cu_seqlens_q[0]);
    for (int sequence = 0; sequence < b->num_seqs; sequence++)
        TRY(check_sequence(b, limits, extra_tokens, sequence));
    if (b->cu_seqlens_q[b->num_seqs] != b->num_tokens)
        return fail(STATUS_INVALID_ARGUMENT, "cu_seqlens_q[%d] is %d, but num_tokens is %d", b->num_seqs,
                    b->cu_seqlens_q[b->num_seqs], b->num_tokens);
    for (int token = 0; token < b->num_tokens; token++) {
        if (b->input_ids[token] < 0 || b->input_ids[token] >= limits->vocab_size)
            return fail(STATUS_INVALID_ARGUMENT, "input_ids[%d] is %d, must be 0 .. %d (vocab_size - 1)",
                        token, b->input_ids[token], limits->vocab_size - 1);
        uint32_t *owner = &slot_owner[b->slot_mapping[token]];
        if (*owner == step)
            return fail(STATUS_INVALID_ARGUMENT, "slot_mapping[%d] is %d, which this step writes twice",
                        token, b->slot_mapping[token]);
        *owner = step;
    }
    TRY(claim_later_slots(b, limits, extra_tokens, slot_owner, step));
    for (int i = 0; i < b->num_logits; i++) {
        int previous = i > 0 ? b->logits_indices[i - 1] : -1;
        if (b->logits_indices[i] <= previous || b->logits_indices[i] >= b->num_tokens)
            return fail(STATUS_INVALID_ARGUMENT, "logits_indices[%d] is %d after %d: must ascend below %d",
                        i, b->logits_indices[i], previous, b->num_tokens);
    }
    return STATUS_OK;
}

int batch_prefill_seqs(const EngineBatch *b, int32_t *seqs) {
    int count = 0;
    for (int i = 0; i < b->num_seqs; i++)
        if (b->cu_seqlens_q[i + 1] - b->cu_seqlens_q[i] > 1) seqs[count++] = i;
    return count;
}
