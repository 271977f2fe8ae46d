// sample.cu -- draw each row's token: temperature, top-k, top-p, min-p, inverse CDF.
//
//   p[i] = exp2((x[i] - max x) * log2(e) / temperature), as an integer w[i] in units of 2^-38
//   kept: x[i] at least the top_k-th largest; of these, those with less than top_p of the mass above
//   them; of these, p[i] >= min_p. The token: the first i at which the kept mass exceeds u times its sum
//
// Shapes    logits [num_rows, vocab_size] float32, ids [num_rows]: arg-max in, token out
// Rounding  p in float32; w cut to an integer, everything after that exact, so that no order of threads
//           or of atomics enters a bit (docs/numerics.md section 8)
// Mapping   one thread block per row. A bound (top-k by count, top-p by mass) is found by radix selection:
//           three passes over the row, each a histogram of eleven bits of the ordered logit; the token by
//           summing 32 parts of the row, then 32 parts of the one that holds it, and so on
// Cost      the row is read 1.03 times for the draw, 3 more for top-k, 4 more for top-p: from the L2 cache
// See       twin/sample.c, tests/kernels/test_bits_sample.py

#include "../common/cuda_status.h"
#include "weight.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kThreads = 1024;  // one block reads a whole row: as many loads in flight as a block may have
constexpr int kWarps = kThreads / kWarp;
constexpr int kDigitBits = 11;  // 32 bits in three passes
constexpr int kBins = 1 << kDigitBits;
constexpr int kBinsPerThread = kBins / kThreads;

// A row under its temperature, and the least of its logits that is still kept.
struct Candidates {
    const float *logits;
    int vocab_size;
    float largest;
    float scale;
    uint32_t least;  // as order_of
};

struct Shared {
    uint32_t low[kBins];  // a bin's sum in two words: shared memory adds 64 bits only by compare-and-swap
    uint32_t high[kBins];
    uint64_t warp_sums[kWarps];
    uint32_t digit;
    uint64_t rest;
};

// Integers ordered as the floats are; the zeros are one.
static __device__ __forceinline__ uint32_t order_of(float x) {
    uint32_t bits = __float_as_uint(__fadd_rn(x, 0.0f));
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

static __device__ __forceinline__ uint64_t mass_of(const Candidates &c, float logit) {
    return weight_of(relative_probability(logit, c.largest, c.scale));
}

static __device__ __forceinline__ void add_to_bin(Shared &shared, uint32_t bin, uint64_t value) {
    uint32_t low = (uint32_t)value, high = (uint32_t)(value >> 32);
    uint32_t before = atomicAdd(&shared.low[bin], low);
    high += before > ~low;  // this addition is the one that carried
    if (high) atomicAdd(&shared.high[bin], high);
}

// The bin from which on upwards the bins sum to `target`, and what of the target is left for it: to
// shared.digit and shared.rest.
static __device__ void find_bin(Shared &shared, uint64_t target) {
    uint64_t bins[kBinsPerThread], own = 0;
    int first = (int)threadIdx.x * kBinsPerThread;
#pragma unroll
    for (int i = 0; i < kBinsPerThread; i++) {
        bins[i] = (uint64_t)shared.high[first + i] << 32 | shared.low[first + i];
        own += bins[i];
    }
    uint64_t from_here = own;  // of this thread's lane upwards
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        uint64_t other = __shfl_down_sync(kFullWarp, from_here, offset);
        if (threadIdx.x % kWarp + offset < kWarp) from_here += other;
    }
    if (threadIdx.x % kWarp == 0) shared.warp_sums[threadIdx.x / kWarp] = from_here;
    __syncthreads();  // every warp's sum visible
    uint64_t above = from_here - own;
    for (int warp = (int)threadIdx.x / kWarp + 1; warp < kWarps; warp++) above += shared.warp_sums[warp];
#pragma unroll
    for (int i = kBinsPerThread - 1; i >= 0; i--) {
        if (above < target && above + bins[i] >= target) {
            shared.digit = (uint32_t)(first + i);
            shared.rest = target - above;
        }
        above += bins[i];
    }
    __syncthreads();  // digit and rest visible; warp_sums and the bins may be written again
}

// The largest bound from which on the kept logits measure at least `target`, by count or by mass.
template <bool kByMass>
static __device__ uint32_t bound_for(const Candidates &c, uint64_t target, Shared &shared) {
    uint32_t bound = 0;
    for (int shift = 32 - kDigitBits; shift > -kDigitBits; shift -= kDigitBits) {
        int low_bit = shift > 0 ? shift : 0;  // the last digit is the ten bits that are left
        int high_bit = shift + kDigitBits;    // bits from here on are decided
        uint32_t mask = (1u << (high_bit - low_bit)) - 1;
        for (int bin = (int)threadIdx.x; bin < kBins; bin += kThreads)
            shared.low[bin] = shared.high[bin] = 0;
        __syncthreads();  // the bins are empty
#pragma unroll 4
        for (int i = (int)threadIdx.x; i < c.vocab_size; i += kThreads) {
            uint32_t order = order_of(c.logits[i]);
            bool is_open = high_bit == 32 || order >> high_bit == bound >> high_bit;
            if (order >= c.least && is_open)
                add_to_bin(shared, order >> low_bit & mask, kByMass ? mass_of(c, c.logits[i]) : 1);
        }
        __syncthreads();  // the bins are full
        find_bin(shared, target);
        bound |= shared.digit << low_bit;
        target = shared.rest;
    }
    return bound;
}

static __device__ int draw(const Candidates &c, float min_p, uint64_t uniform, Shared &shared) {
    int begin = 0, length = c.vocab_size, warp = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    uint64_t point = 0;  // how far into the mass of this part of the row
    for (bool is_whole = true; length > 1; is_whole = false) {
        int part = (length - 1) / kWarps + 1;
        int first = begin + min(warp * part, length), end = begin + min((warp + 1) * part, length);
        uint64_t sum = 0;
#pragma unroll 4
        for (int i = first + lane; i < end; i += kWarp) {
            float p = relative_probability(c.logits[i], c.largest, c.scale);
            if (order_of(c.logits[i]) >= c.least && p >= min_p) sum += weight_of(p);
        }
        sum = warp_sum(sum);
        __syncthreads();  // the last parts' sums are read
        if (lane == 0) shared.warp_sums[warp] = sum;
        __syncthreads();  // every part's sum visible
        uint64_t upto = shared.warp_sums[lane];
        sum = upto;
#pragma unroll
        for (int offset = 1; offset < kWarp; offset *= 2) {
            uint64_t other = __shfl_up_sync(kFullWarp, upto, offset);
            if (lane >= offset) upto += other;
        }
        if (is_whole) point = __umul64hi(uniform, __shfl_sync(kFullWarp, upto, kWarp - 1));
        int chosen = __ffs((int)__ballot_sync(kFullWarp, upto > point)) - 1;
        point -= __shfl_sync(kFullWarp, upto - sum, chosen);
        begin += chosen * part;
        length = min(part, length - chosen * part);
    }
    return begin;
}

static __global__ void __launch_bounds__(kThreads)
    sample_kernel(int32_t *ids, const float *logits, const SampleRow *rows, int vocab_size) {
    __shared__ Shared shared;
    const SampleRow &row = rows[blockIdx.x];
    Candidates c = {logits + (size_t)blockIdx.x * vocab_size, vocab_size, 0.0f, row.scale, 0};
    c.largest = c.logits[ids[blockIdx.x]];
    if (row.scale == 0.0f || !isfinite(c.largest)) return;
    if (row.top_k > 0 && row.top_k < vocab_size) c.least = bound_for<false>(c, (uint64_t)row.top_k, shared);
    if (row.top_p > 0) {
        uint64_t own = 0;
#pragma unroll 4
        for (int i = (int)threadIdx.x; i < vocab_size; i += kThreads)
            if (order_of(c.logits[i]) >= c.least) own += mass_of(c, c.logits[i]);
        uint64_t total = block_sum<kWarps>(own, shared.warp_sums);
        // Above a kept token there is less than top_p of the mass: the product, rounded up.
        uint64_t target = __umul64hi(total, row.top_p) + (total * row.top_p != 0);
        c.least = bound_for<true>(c, target, shared);
    }
    int token = draw(c, row.min_p, row.uniform, shared);
    __syncthreads();  // every thread has read the arg-max
    if (threadIdx.x == 0) ids[blockIdx.x] = token;
}

extern "C" Status cuda_sample(int32_t *ids, const float *logits, const SampleRow *rows, int num_rows,
                              int vocab_size, Stream stream) {
    if (num_rows == 0) return STATUS_OK;
    sample_kernel<<<num_rows, kThreads, 0, (cudaStream_t)stream>>>(ids, logits, rows, vocab_size);
    return CUDA_STATUS(cudaGetLastError());
}
