// edit_logits.c -- what the request and its own tokens do to single logits before the choice.
//
//   x = logit + bias;  seen: x > 0 ? x / repetition : x * repetition;  x - count * frequency;
//   count > 0: x - presence;  banned: -inf
//
// Shapes    logits [num_rows, vocab_size] float32, edits [num_edits]
// Rounding  each operation to float32, docs/numerics.md section 8
// See       kernels/edit_logits.cu, tests/twin/test_edit_logits.py

#include <math.h>
#include "../kernels/kernels.h"

Status twin_edit_logits(float *logits, float *saved, const LogitEdit *edits, const SampleRow *rows,
                        int num_edits, int vocab_size, Stream stream) {
    (void)stream;
    for (int i = 0; i < num_edits; i++) {
        const LogitEdit *edit = &edits[i];
        const SampleRow *row = &rows[edit->row];
        float *logit = logits + (size_t)edit->row * vocab_size + edit->token_id;
        saved[i] = *logit;
        float x = *logit + edit->bias;
        if (edit->flags & EDIT_SEEN)
            x = x > 0.0f ? x / row->repetition_penalty : x * row->repetition_penalty;
        x = x - (float)edit->count * row->frequency_penalty;
        if (edit->count > 0) x = x - row->presence_penalty;
        *logit = edit->flags & EDIT_BANNED ? -INFINITY : x;
    }
    return STATUS_OK;
}

Status twin_restore_logits(float *logits, const float *saved, const LogitEdit *edits, int num_edits,
                           int vocab_size, Stream stream) {
    (void)stream;
    for (int i = 0; i < num_edits; i++)
        logits[(size_t)edits[i].row * vocab_size + edits[i].token_id] = saved[i];
    return STATUS_OK;
}
