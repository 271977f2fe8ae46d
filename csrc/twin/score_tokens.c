// score_tokens.c -- what the log-probabilities of a token and of the most likely ones are made of.
//
//   mass = sum_i w[i], w as in sample.c at temperature 1;  rank = 1 + how many come before the token
//
// Shapes    logits [num_rows, vocab_size] float32, scores [num_rows]
// Rounding  as in sample.c; the logarithm is taken by model/sample.c
// See       kernels/score_tokens.cu, tests/twin/test_score_tokens.py

#include <math.h>
#include "threads.h"
#include "weight.h"

typedef struct Arguments {
    TokenScore *scores;
    const float *logits;
    const int32_t *ids;
    const SampleRow *rows;
    int vocab_size;
} Arguments;

// The arg-max's order: larger values first, NaN before all, lower ids first among equals.
static int comes_before(const float *logits, int a, int b) {
    int a_is_nan = logits[a] != logits[a], b_is_nan = logits[b] != logits[b];
    if (a_is_nan != b_is_nan) return a_is_nan;
    if (!a_is_nan && logits[a] != logits[b]) return logits[a] > logits[b];
    return a < b;
}

// The first `count` of all in that order; -1 where there are no more.
static void find_best(const float *logits, int vocab_size, int32_t *best, int count) {
    for (int i = 0; i < count; i++) best[i] = -1;
    for (int i = 0; i < vocab_size; i++) {
        int place = count;
        while (place > 0 && (best[place - 1] < 0 || comes_before(logits, i, best[place - 1]))) place--;
        if (place == count) continue;
        memmove(&best[place + 1], &best[place], (size_t)(count - 1 - place) * sizeof *best);
        best[place] = i;
    }
}

static void score_row(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const Arguments *a = arguments;
    const SampleRow *row = &a->rows[index];
    if (row->num_logprobs < 0) return;
    const float *logits = a->logits + (size_t)index * a->vocab_size;
    int token = row->scored_id < 0 ? a->ids[index] : row->scored_id;
    TokenScore score = {.logit = logits[token], .rank = 1};
    find_best(logits, a->vocab_size, score.top_ids, row->num_logprobs > 0 ? row->num_logprobs : 1);
    score.largest = logits[score.top_ids[0]];
    for (int i = 0; i < a->vocab_size; i++) {
        if (comes_before(logits, i, token)) score.rank++;
        if (isfinite(score.largest))
            score.mass +=
                weight_of(relative_probability(logits[i], score.largest, numerics_constant(LOG2_E)));
    }
    for (int i = 0; i < row->num_logprobs && score.top_ids[i] >= 0; i++)
        score.top_logits[i] = logits[score.top_ids[i]];
    a->scores[index] = score;
}

Status twin_score_tokens(TokenScore *scores, const float *logits, const int32_t *ids, const SampleRow *rows,
                         int num_rows, int vocab_size, Stream stream) {
    Arguments arguments = {scores, logits, ids, rows, vocab_size};
    parallel_for(stream, num_rows, score_row, &arguments);
    return STATUS_OK;
}
