// sample.c -- draw each row's token: temperature, top-k, top-p, min-p, inverse CDF.
//
//   p[i] = exp2((x[i] - max x) * log2(e) / temperature), as an integer w[i] in units of 2^-38
//   kept: x[i] at least the top_k-th largest; of these, those with less than top_p of the mass above
//   them; of these, p[i] >= min_p. The token: the first i at which the kept mass exceeds u times its sum
//
// Shapes    logits [num_rows, vocab_size] float32, ids [num_rows]: arg-max in, token out
// Rounding  p in float32; w cut to an integer, everything after that exact (docs/numerics.md section 8)
// See       kernels/sample.cu, tests/twin/test_sample.py

#include <math.h>
#include "threads.h"
#include "weight.h"

// A row under its temperature, and the least of its logits that is still kept.
typedef struct Candidates {
    const float *logits;
    int vocab_size;
    float largest;
    float scale;
    uint32_t least;  // as order_of
} Candidates;

// Integers ordered as the floats are; the zeros are one.
static uint32_t order_of(float x) {
    x = x + 0.0f;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static uint64_t count_of(const Candidates *c, float logit) {
    (void)c, (void)logit;
    return 1;
}

static uint64_t mass_of(const Candidates *c, float logit) {
    return weight_of(relative_probability(logit, c->largest, c->scale));
}

typedef uint64_t Measure(const Candidates *candidates, float logit);

// Over the kept logits whose order is `first` or more and less than `end`.
static uint64_t sum_between(const Candidates *c, Measure *measure, uint32_t first, uint64_t end) {
    uint64_t sum = 0;
    for (int i = 0; i < c->vocab_size; i++) {
        uint32_t order = order_of(c->logits[i]);
        if (order >= first && order >= c->least && order < end) sum += measure(c, c->logits[i]);
    }
    return sum;
}

// The largest bound from which on the kept logits measure at least `target`: bit by bit from the highest.
static uint32_t bound_for(const Candidates *c, Measure *measure, uint64_t target) {
    uint32_t bound = 0;
    uint64_t end = 1ull << 32, above = 0;  // what is counted already: everything from `end` on
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        uint64_t sum = above + sum_between(c, measure, bound | bit, end);
        if (sum >= target)
            bound |= bit;
        else
            end = bound | bit, above = sum;
    }
    return bound;  // not below c->least: from there on is all there is
}

// The high half of a 128-bit product: a * b / 2^64.
static uint64_t fraction_of(uint64_t a, uint64_t b) {
    return (uint64_t)(((unsigned __int128)a * b) >> 64);
}

static uint64_t kept_mass(const Candidates *c, float min_p, float logit) {
    float p = relative_probability(logit, c->largest, c->scale);
    return order_of(logit) >= c->least && p >= min_p ? weight_of(p) : 0;
}

static int draw(const Candidates *c, float min_p, uint64_t uniform) {
    uint64_t total = 0, sum = 0;
    for (int i = 0; i < c->vocab_size; i++) total += kept_mass(c, min_p, c->logits[i]);
    uint64_t point = fraction_of(uniform, total);  // below total, which the arg-max keeps above zero
    int token = 0;
    while ((sum += kept_mass(c, min_p, c->logits[token])) <= point) token++;
    return token;
}

typedef struct Arguments {
    int32_t *ids;
    const float *logits;
    const SampleRow *rows;
    int vocab_size;
} Arguments;

static void sample_row(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const Arguments *a = arguments;
    const SampleRow *row = &a->rows[index];
    const float *logits = a->logits + (size_t)index * a->vocab_size;
    Candidates c = {logits, a->vocab_size, logits[a->ids[index]], row->scale, 0};
    if (row->scale == 0.0f || !isfinite(c.largest)) return;
    if (row->top_k > 0 && row->top_k < a->vocab_size) c.least = bound_for(&c, count_of, row->top_k);
    if (row->top_p > 0) {
        // Above a kept token there is less than top_p of the mass: the product, rounded up.
        uint64_t total = sum_between(&c, mass_of, 0, 1ull << 32);
        uint64_t target = fraction_of(total, row->top_p) + (total * row->top_p != 0);
        c.least = bound_for(&c, mass_of, target);
    }
    a->ids[index] = draw(&c, row->min_p, row->uniform);
}

Status twin_sample(int32_t *ids, const float *logits, const SampleRow *rows, int num_rows, int vocab_size,
                   Stream stream) {
    Arguments arguments = {ids, logits, rows, vocab_size};
    parallel_for(stream, num_rows, sample_row, &arguments);
    return STATUS_OK;
}
