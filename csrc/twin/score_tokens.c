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

// The first of those that come after `previous`, or of all where that is -1; -1 where there is none.
static int next_best(const float *logits, int vocab_size, int previous) {
    int best = -1;
    for (int i = 0; i < vocab_size; i++)
        if ((previous < 0 || comes_before(logits, previous, i)) &&
            (best < 0 || comes_before(logits, i, best)))
            best = i;
    return best;
}

static void score_row(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const Arguments *a = arguments;
    const SampleRow *row = &a->rows[index];
    if (row->num_logprobs < 0) return;
    const float *logits = a->logits + (size_t)index * a->vocab_size;
    int token = row->scored_id < 0 ? a->ids[index] : row->scored_id;
    int best = next_best(logits, a->vocab_size, -1);
    TokenScore score = {.largest = logits[best], .logit = logits[token], .rank = 1};
    for (int i = 0; i < a->vocab_size; i++) {
        if (comes_before(logits, i, token)) score.rank++;
        if (isfinite(score.largest))
            score.mass +=
                weight_of(relative_probability(logits[i], score.largest, numerics_constant(LOG2_E)));
    }
    for (int i = 0; i < row->num_logprobs; i++) {
        score.top_ids[i] = best;
        score.top_logits[i] = best < 0 ? 0.0f : logits[best];
        if (best >= 0) best = next_best(logits, a->vocab_size, best);
    }
    a->scores[index] = score;
}

Status twin_score_tokens(TokenScore *scores, const float *logits, const int32_t *ids, const SampleRow *rows,
                         int num_rows, int vocab_size, Stream stream) {
    Arguments arguments = {scores, logits, ids, rows, vocab_size};
    parallel_for(stream, num_rows, score_row, &arguments);
    return STATUS_OK;
}
