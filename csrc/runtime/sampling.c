// sampling.c -- the door for a step's sampling: ranges, ids, sums and duplicates, before any work.

#include <math.h>
#include "batch.h"

static Status check_number(int row, const char *name, float value, float low, float high) {
    if (!(value >= low && value <= high))
        return fail(STATUS_INVALID_ARGUMENT, "sampling.rows[%d].%s is %g, must be %g .. %g", row, name,
                    (double)value, (double)low, (double)high);
    return STATUS_OK;
}

static Status check_integer(int row, const char *name, int64_t value, int64_t low, int64_t high) {
    if (value < low || value > high)
        return fail(STATUS_INVALID_ARGUMENT, "sampling.rows[%d].%s is %lld, must be %lld .. %lld", row,
                    name, (long long)value, (long long)low, (long long)high);
    return STATUS_OK;
}

static Status check_row(const EngineSampling *s, int index, int vocab_size) {
    const EngineSamplingRow *row = &s->rows[index];
    if (row->temperature != 0.0f) TRY(check_number(index, "temperature", row->temperature, 1e-5f, 100.0f));
    TRY(check_number(index, "top_p", row->top_p, 1e-6f, 1.0f));
    TRY(check_number(index, "min_p", row->min_p, 0.0f, 1.0f));
    TRY(check_number(index, "repetition_penalty", row->repetition_penalty, 0.01f, 100.0f));
    TRY(check_number(index, "presence_penalty", row->presence_penalty, -2.0f, 2.0f));
    TRY(check_number(index, "frequency_penalty", row->frequency_penalty, -2.0f, 2.0f));
    TRY(check_integer(index, "position", row->position, 0, INT32_MAX));
    TRY(check_integer(index, "choice", row->choice, 0, INT32_MAX));
    TRY(check_integer(index, "top_k", row->top_k, 0, INT32_MAX));
    TRY(check_integer(index, "num_logprobs", row->num_logprobs, -1, s->max_logprobs));
    TRY(check_integer(index, "scored_id", row->scored_id, -1, vocab_size - 1));
    TRY(check_integer(index, "num_edits", row->num_edits, 0, vocab_size));
    if (row->num_logprobs >= 0 && (!s->token_logprobs || !s->token_ranks))
        return fail(STATUS_INVALID_ARGUMENT,
                    "sampling.rows[%d].num_logprobs is %d, but an output of scores is null", index,
                    row->num_logprobs);
    if (row->num_logprobs > 0 && (!s->top_ids || !s->top_logprobs))
        return fail(STATUS_INVALID_ARGUMENT,
                    "sampling.rows[%d].num_logprobs is %d, but an output of alternatives is null", index,
                    row->num_logprobs);
    return STATUS_OK;
}

static Status check_edit(const EngineLogitEdit *edit, int index, int vocab_size, uint8_t *is_edited) {
    if (edit->token_id < 0 || edit->token_id >= vocab_size)
        return fail(STATUS_INVALID_ARGUMENT, "sampling.edits[%d].token_id is %d, must be 0 .. %d", index,
                    edit->token_id, vocab_size - 1);
    if (is_edited[edit->token_id])
        return fail(STATUS_INVALID_ARGUMENT, "sampling.edits[%d].token_id is %d, which its row already has",
                    index, edit->token_id);
    if (edit->count < 0)
        return fail(STATUS_INVALID_ARGUMENT, "sampling.edits[%d].count is %d, must be at least 0", index,
                    edit->count);
    if (!(fabsf(edit->bias) <= 100.0f))
        return fail(STATUS_INVALID_ARGUMENT, "sampling.edits[%d].bias is %g, must be -100 .. 100", index,
                    (double)edit->bias);
    if (edit->flags & ~(EDIT_SEEN | EDIT_BANNED))
        return fail(STATUS_INVALID_ARGUMENT, "sampling.edits[%d].flags is %d, must be 0 .. %d", index,
                    edit->flags, EDIT_SEEN | EDIT_BANNED);
    return STATUS_OK;
}

// One row's edits; `is_edited` is all zero before and after.
static Status check_edits(const EngineLogitEdit *edits, int first, int count, int vocab_size,
                          uint8_t *is_edited) {
    Status status = STATUS_OK;
    int checked = 0;
    for (; checked < count && status == STATUS_OK; checked++) {
        const EngineLogitEdit *edit = &edits[first + checked];
        status = check_edit(edit, first + checked, vocab_size, is_edited);
        if (status == STATUS_OK) is_edited[edit->token_id] = 1;
    }
    if (status != STATUS_OK) checked--;  // the refused one left no mark
    for (int i = 0; i < checked; i++) is_edited[edits[first + i].token_id] = 0;
    return status;
}

Status sampling_check(const EngineSampling *s, int num_rows, int vocab_size, uint8_t *is_edited) {
    if (num_rows > 0 && !s->rows) return fail(STATUS_INVALID_ARGUMENT, "sampling.rows is null");
    if (s->max_logprobs < 0 || s->max_logprobs > ENGINE_MAX_LOGPROBS)
        return fail(STATUS_INVALID_ARGUMENT, "sampling.max_logprobs is %d, must be 0 .. %d",
                    s->max_logprobs, ENGINE_MAX_LOGPROBS);
    if (s->num_edits < 0 || (s->num_edits > 0 && !s->edits))
        return fail(STATUS_INVALID_ARGUMENT, "sampling.num_edits is %d%s", s->num_edits,
                    s->num_edits < 0 ? ", must be at least 0" : ", but edits is null");
    int64_t num_edits = 0;
    for (int i = 0; i < num_rows; i++) {
        TRY(check_row(s, i, vocab_size));
        num_edits += s->rows[i].num_edits;
    }
    if (num_edits != s->num_edits)
        return fail(STATUS_INVALID_ARGUMENT, "sampling.num_edits is %d, but its rows have %lld",
                    s->num_edits, (long long)num_edits);
    for (int i = 0, first = 0; i < num_rows; first += s->rows[i++].num_edits)
        TRY(check_edits(s->edits, first, s->rows[i].num_edits, vocab_size, is_edited));
    return STATUS_OK;
}
