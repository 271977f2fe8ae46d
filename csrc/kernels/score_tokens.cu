// score_tokens.cu -- what the log-probabilities of a token and of the most likely ones are made of.
//
//   mass = sum_i w[i], w as in sample.cu at temperature 1;  rank = 1 + how many come before the token
//
// Shapes    logits [num_rows, vocab_size] float32, scores [num_rows]
// Rounding  as in sample.cu; the logarithm is taken by model/sample.c, on the host for both backends
// Mapping   one thread block per scored row. Each thread holds the best of its share of the row; the best
// of
//           those is the next of the alternatives, and the warp that gave it looks for its owner's next
// Cost      the row is read 2 times, from the L2 cache; an alternative costs 1 / 1024 of that
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

static __device__ __forceinline__ Place no_place() {
    return {0.0f, INT32_MAX};
}

// The best of every thread's best; every thread gets it.
static __device__ Place block_best(Place own, Shared &shared) {
    own = warp_best(own);
    __syncthreads();  // the last bests are read
    if (threadIdx.x % kWarp == 0) shared.warp_bests[threadIdx.x / kWarp] = own;
    __syncthreads();  // every warp's best visible
    return warp_best(shared.warp_bests[threadIdx.x % kWarp]);
}

// After `taken` was the block's best: the thread that gave it gets the next of its share.
static __device__ Place next_of_share(Place own, Place taken, const float *logits, int vocab_size) {
    int owner = taken.id % kThreads, lane = (int)threadIdx.x % kWarp;
    if (owner / kWarp != (int)threadIdx.x / kWarp) return own;
    Place next = no_place();
    for (int i = owner + lane * kThreads; i < vocab_size; i += kWarp * kThreads) {
        Place place = {logits[i], i};
        if (comes_before(taken, place) && comes_before(place, next)) next = place;
    }
    next = warp_best(next);
    return owner % kWarp == lane ? next : own;
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
    Place own = no_place();
#pragma unroll 4
    for (int i = (int)threadIdx.x; i < vocab_size; i += kThreads) {
        Place place = {values[i], i};
        if (comes_before(place, own)) own = place;
    }
    Place best = block_best(own, shared);
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
        bool is_place = best.id != INT32_MAX;
        if (threadIdx.x == 0) {
            score->top_ids[i] = is_place ? best.id : -1;
            score->top_logits[i] = is_place ? best.logit : 0.0f;
        }
        if (is_place && i + 1 < row.num_logprobs) {
            own = next_of_share(own, best, values, vocab_size);
            best = block_best(own, shared);
        }
    }
}

extern "C" Status cuda_score_tokens(TokenScore *scores, const float *logits, const int32_t *ids,
                                    const SampleRow *rows, int num_rows, int vocab_size, Stream stream) {
    if (num_rows == 0) return STATUS_OK;
    score_tokens_kernel<<<num_rows, kThreads, 0, (cudaStream_t)stream>>>(scores, logits, ids, rows,
                                                                         vocab_size);
    return CUDA_STATUS(cudaGetLastError());
}
