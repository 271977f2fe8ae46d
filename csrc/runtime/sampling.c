// sampling.c -- the door for a step's sampling: ranges, ids, sums and duplicates, before any work.

#include <math.h>
#include <string.h>
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
    TRY(check_integer(index, "first_edit", row->first_edit, 0, s->num_edits));
    if (row->num_edits > s->num_edits - row->first_edit)
        return fail(STATUS_INVALID_ARGUMENT,
                    "sampling.rows[%d] has %d edits from %d on, but sampling.num_edits is %d", index,
                    row->num_edits, row->first_edit, s->num_edits);
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

static Status check_edit(const EngineLogitEdit *edit, int index, int vocab_size, uint8_t mark,
                         uint8_t *edited_by) {
    if (edit->token_id < 0 || edit->token_id >= vocab_size)
        return fail(STATUS_INVALID_ARGUMENT, "sampling.edits[%d].token_id is %d, must be 0 .. %d", index,
                    edit->token_id, vocab_size - 1);
    if (edited_by[edit->token_id] == mark)
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
    edited_by[edit->token_id] = mark;
    return STATUS_OK;
}

// Every row's edits. A row leaves its mark at its tokens; the scratch is cleared when no mark is left.
static Status check_edits(const EngineSampling *s, int num_rows, int vocab_size, uint8_t *edited_by) {
    uint8_t mark = 0;
    for (int row = 0; row < num_rows; row++) {
        int first = s->rows[row].first_edit, count = s->rows[row].num_edits;
        if (count > 0 && mark++ % UINT8_MAX == 0) {
            memset(edited_by, 0, (size_t)vocab_size);
            mark = 1;
        }
        for (int i = first; i < first + count; i++)
            TRY(check_edit(&s->edits[i], i, vocab_size, mark, edited_by));
    }
    return STATUS_OK;
}

Status sampling_check(const EngineSampling *s, int num_rows, int vocab_size, uint8_t *edited_by) {
    if (num_rows > 0 && !s->rows) return fail(STATUS_INVALID_ARGUMENT, "sampling.rows is null");
    if (s->max_logprobs < 0 || s->max_logprobs > ENGINE_MAX_LOGPROBS)
        return fail(STATUS_INVALID_ARGUMENT, "sampling.max_logprobs is %d, must be 0 .. %d",
                    s->max_logprobs, ENGINE_MAX_LOGPROBS);
    if (s->num_edits < 0 || (s->num_edits > 0 && !s->edits))
        return fail(STATUS_INVALID_ARGUMENT, "sampling.num_edits is %d%s", s->num_edits,
                    s->num_edits < 0 ? ", must be at least 0" : ", but edits is null");
    for (int row = 0; row < num_rows; row++) TRY(check_row(s, row, vocab_size));
    return check_edits(s, num_rows, vocab_size, edited_by);
}
