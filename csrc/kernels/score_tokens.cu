// score_tokens.cu -- what the log-probabilities of a token and of the most likely ones are made of.
//
//   mass = sum_i w[i], w as in sample.cu at temperature 1;  rank = 1 + how many come before the token
//
// Shapes    logits [num_rows, vocab_size] float32, scores [num_rows]
// Rounding  as in sample.cu; the logarithm is taken by model/sample.c, on the host for both backends
// Mapping   one thread block per scored row; the most likely tokens one pass each, the next after the last
// Cost      the row is read 2 times, and once more per alternative after the first: from the L2 cache
// See       twin/score_tokens.c, tests/kernels/test_bits_sample.py

#include "../common/cuda_status.h"
#include "weight.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 1024;  // one block reads a whole row: as many loads in flight as a block may have
constexpr int kWarps = kThreads / kWarp;

struct Place {
    float logit;
    int id;  // INT32_MAX: no place at all, which comes after every other
};

struct Shared {
    Place warp_bests[kWarps];
    uint64_t warp_sums[kWarps];
};

// The arg-max's order: larger values first, NaN before all, lower ids first among equals.
static __device__ __forceinline__ bool comes_before(Place a, Place b) {
    if (a.id == INT32_MAX || b.id == INT32_MAX) return b.id == INT32_MAX && a.id != INT32_MAX;
    bool a_is_nan = a.logit != a.logit, b_is_nan = b.logit != b.logit;
    if (a_is_nan != b_is_nan) return a_is_nan;
    if (!a_is_nan && a.logit != b.logit) return a.logit > b.logit;
    return a.id < b.id;
}

static __device__ __forceinline__ Place warp_best(Place best) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        Place other = {__shfl_xor_sync(kFullWarp, best.logit, offset),
                       __shfl_xor_sync(kFullWarp, best.id, offset)};
        if (comes_before(other, best)) best = other;
    }
    return best;
}

// The first of those that come after `previous`, or of all where that is no place; every thread gets it.
static __device__ Place next_best(const float *logits, int vocab_size, Place previous, Shared &shared) {
    Place best = {0.0f, INT32_MAX};
    bool is_first = previous.id == INT32_MAX;
#pragma unroll 4
    for (int i = (int)threadIdx.x; i < vocab_size; i += kThreads) {
        Place place = {logits[i], i};
        if ((is_first || comes_before(previous, place)) && comes_before(place, best)) best = place;
    }
    best = warp_best(best);
    __syncthreads();  // the last bests are read
    if (threadIdx.x % kWarp == 0) shared.warp_bests[threadIdx.x / kWarp] = best;
    __syncthreads();  // every warp's best visible
    return warp_best(shared.warp_bests[threadIdx.x % kWarp]);
}

static __global__ void __launch_bounds__(kThreads)
    score_tokens_kernel(TokenScore *scores, const float *logits, const int32_t *ids, const SampleRow *rows,
                        int vocab_size) {
    __shared__ Shared shared;
    const SampleRow &row = rows[blockIdx.x];
    if (row.num_logprobs < 0) return;
    const float *values = logits + (size_t)blockIdx.x * vocab_size;
    TokenScore *score = scores + blockIdx.x;
    int id = row.scored_id < 0 ? ids[blockIdx.x] : row.scored_id;
    Place token = {values[id], id};
    Place best = next_best(values, vocab_size, Place{0.0f, INT32_MAX}, shared);
    float largest = best.logit;
    uint64_t mass = 0, before = 0;
#pragma unroll 4
    for (int i = (int)threadIdx.x; i < vocab_size; i += kThreads) {
        before += comes_before(Place{values[i], i}, token);
        mass += weight_of(relative_probability(values[i], largest, __int_as_float(LOG2_E)));
    }
    mass = block_sum<kWarps>(mass, shared.warp_sums);
    before = block_sum<kWarps>(before, shared.warp_sums);
    if (threadIdx.x == 0) {
        score->mass = isfinite(largest) ? mass : 0;
        score->largest = largest;
        score->logit = token.logit;
        score->rank = (int32_t)before + 1;
    }
    for (int i = 0; i < row.num_logprobs; i++) {
        if (threadIdx.x == 0) {
            score->top_ids[i] = best.id == INT32_MAX ? -1 : best.id;
            score->top_logits[i] = best.id == INT32_MAX ? 0.0f : best.logit;
        }
        if (best.id != INT32_MAX && i + 1 < row.num_logprobs)
            best = next_best(values, vocab_size, best, shared);
    }
}

extern "C" Status cuda_score_tokens(TokenScore *scores, const float *logits, const int32_t *ids,
                                    const SampleRow *rows, int num_rows, int vocab_size, Stream stream) {
    if (num_rows == 0) return STATUS_OK;
    score_tokens_kernel<<<num_rows, kThreads, 0, (cudaStream_t)stream>>>(scores, logits, ids, rows,
                                                                         vocab_size);
    return CUDA_STATUS(cudaGetLastError());
}
