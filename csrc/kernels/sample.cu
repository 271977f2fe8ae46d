// sample.cu -- draw each row's token: temperature, top-k, top-p, min-p, inverse CDF.
//
//   p[i] = exp2((x[i] - max x) * log2(e) / temperature), as an integer w[i] in units of 2^-38
//   kept: x[i] at least the top_k-th largest; of these, those with less than top_p of the mass above
//   them; of these, p[i] >= min_p. The token: the first i at which the kept mass exceeds u times its sum
//
// Shapes    logits [num_rows, vocab_size] float32, ids [num_rows]: arg-max in, token out
// Rounding  p in float32; w cut to an integer, everything after that exact, so that no order of threads
//           or of atomics enters a bit (docs/numerics.md section 8)
// Mapping   a cluster of 1, 2, 4 or 8 thread blocks per row, as many as the device holds. A bound (top-k by
//           count, top-p by mass) is found by radix selection: three passes over the row, each a histogram
//           of eleven bits of the ordered logit; the token by summing parts of the row, one per warp, then
//           parts of the one that holds it, and so on
// Cost      the row is read 1.03 times for the draw, 3 more for top-k, 3 more for top-p: from the L2 cache
// See       twin/sample.c, tests/kernels/test_bits_sample.py

#include <cooperative_groups.h>

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
static_assert(kBinsPerThread == 2 && kWarps == kWarp, "a thread takes two bins; a warp, every warp's sum");
constexpr int kMaxClusterBlocks = 8;
constexpr int kBlocksPerMultiprocessor = 2;
// Blocks up to which rows get clusters. With twice as many, clusters of eight wait for room: 32 rows took
// 79 us, not 28.
constexpr int kDeviceBlocks = 132;
constexpr int kLoads = 4;  // in flight per thread

using Cluster = cooperative_groups::cluster_group;

// A row under its temperature, and the least of its logits that is still kept.
struct Candidates {
    const float *logits;
    int vocab_size;
    float largest;
    float scale;
    uint32_t least;  // as order_of
};

// A bin's sum in two words: shared memory adds 64 bits only by compare-and-swap.
struct Bin {
    uint32_t low;
    uint32_t high;
};

struct alignas(16) Shared {
    Bin bins[kBins];
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

// This thread's share of the row.
template <typename Visit>
static __device__ __forceinline__ void for_each_logit(const Candidates &c, int first, int end, int stride,
                                                      Visit visit) {
    int i = first;
    for (; i < end - (kLoads - 1) * stride; i += kLoads * stride) {
        float loaded[kLoads];
#pragma unroll
        for (int j = 0; j < kLoads; j++) loaded[j] = c.logits[i + j * stride];
#pragma unroll
        for (int j = 0; j < kLoads; j++) visit(loaded[j]);
    }
    for (; i < end; i += stride) visit(c.logits[i]);
}

static __device__ __forceinline__ void add_to_bin(Shared &shared, uint32_t bin, uint64_t value) {
    uint32_t low = (uint32_t)value, high = (uint32_t)(value >> 32);
    uint32_t before = atomicAdd(&shared.bins[bin].low, low);
    high += before > ~low;  // this addition is the one that carried
    if (high) atomicAdd(&shared.bins[bin].high, high);
}

// a * b / 2^64, rounded up.
static __device__ __forceinline__ uint64_t fraction_of(uint64_t a, uint64_t b) {
    return __umul64hi(a, b) + (a * b != 0);
}

// The bin from which on upwards the cluster's bins sum to `target`, or to the fraction `of_sum` of their
// sum where that is not zero, and what of the target is left for it: to shared.digit and shared.rest.
static __device__ void find_bin(const Cluster &cluster, Shared &shared, uint64_t target, uint64_t of_sum) {
    uint64_t bins[kBinsPerThread] = {}, own = 0;
    int first = (int)threadIdx.x * kBinsPerThread;
    unsigned num_blocks = cluster.num_blocks(), rank = cluster.block_rank();
    for (unsigned i = 0; i < num_blocks; i++) {  // every block begins with another
        const Shared *remote = cluster.map_shared_rank(&shared, (rank + i) % num_blocks);
        uint4 pair = *reinterpret_cast<const uint4 *>(&remote->bins[first]);
        bins[0] += (uint64_t)pair.y << 32 | pair.x;
        bins[1] += (uint64_t)pair.w << 32 | pair.z;
    }
    own = bins[0] + bins[1];
    uint64_t from_here = own;  // of this thread's lane upwards
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        uint64_t other = __shfl_down_sync(kFullWarp, from_here, offset);
        if (threadIdx.x % kWarp + offset < kWarp) from_here += other;
    }
    if (threadIdx.x % kWarp == 0) shared.warp_sums[threadIdx.x / kWarp] = from_here;
    __syncthreads();  // every warp's sum visible
    uint64_t of_warp = shared.warp_sums[threadIdx.x % kWarp], sum = warp_sum(of_warp);
    bool is_above = threadIdx.x % kWarp > threadIdx.x / kWarp;
    uint64_t above = from_here - own + warp_sum(is_above ? of_warp : 0);
    if (of_sum) target = fraction_of(sum, of_sum);
#pragma unroll
    for (int i = kBinsPerThread - 1; i >= 0; i--) {
        if (above < target && above + bins[i] >= target) {
            shared.digit = (uint32_t)(first + i);
            shared.rest = target - above;
        }
        above += bins[i];
    }
    cluster.sync();  // digit and rest visible; every block has read every block's bins
}

// The largest bound from which on the kept logits measure at least `target` by count, or the fraction
// `top_p` of all of them by mass.
template <bool kByMass>
static __device__ uint32_t bound_for(const Cluster &cluster, const Candidates &c, uint64_t target,
                                     uint64_t top_p, Shared &shared) {
    uint32_t bound = 0;
    int stride = kThreads * (int)cluster.num_blocks();
    int own = (int)(cluster.block_rank() * kThreads + threadIdx.x);
    for (int shift = 32 - kDigitBits; shift > -kDigitBits; shift -= kDigitBits) {
        int low_bit = shift > 0 ? shift : 0;  // the last digit is the ten bits that are left
        int high_bit = shift + kDigitBits;    // bits from here on are decided
        uint32_t mask = (1u << (high_bit - low_bit)) - 1;
        for (int bin = (int)threadIdx.x; bin < kBins; bin += kThreads) shared.bins[bin] = {0, 0};
        __syncthreads();  // the bins are empty
        for_each_logit(c, own, c.vocab_size, stride, [&](float logit) {
            uint32_t order = order_of(logit);
            bool is_open = high_bit == 32 || order >> high_bit == bound >> high_bit;
            if (order >= c.least && is_open)
                add_to_bin(shared, order >> low_bit & mask, kByMass ? mass_of(c, logit) : 1);
        });
        cluster.sync();  // every block's bins are full
        find_bin(cluster, shared, target, high_bit == 32 ? top_p : 0);
        bound |= shared.digit << low_bit;
        target = shared.rest;
    }
    return bound;
}

// Which of the parts, summed by the warps of `num_blocks` blocks, holds the point; the point becomes
// relative to it. With `uniform`, the point is first that fraction of the sum.
static __device__ int find_part(const Cluster &cluster, Shared &shared, int num_blocks, bool is_first,
                                uint64_t uniform, uint64_t &point) {
    int lane = (int)threadIdx.x % kWarp;
    auto sum_of = [&](int part) {
        const Shared *block = num_blocks > 1 ? cluster.map_shared_rank(&shared, part / kWarps) : &shared;
        return block->warp_sums[part % kWarps];
    };
    uint64_t own = 0;
    for (int i = 0; i < num_blocks; i++) own += sum_of(lane * num_blocks + i);
    uint64_t upto = own;
#pragma unroll
    for (int offset = 1; offset < kWarp; offset *= 2) {
        uint64_t other = __shfl_up_sync(kFullWarp, upto, offset);
        if (lane >= offset) upto += other;
    }
    if (is_first) point = __umul64hi(uniform, __shfl_sync(kFullWarp, upto, kWarp - 1));
    int chosen = __ffs((int)__ballot_sync(kFullWarp, upto > point)) - 1;
    point -= __shfl_sync(kFullWarp, upto - own, chosen);
    int part = chosen * num_blocks;
    for (uint64_t sum = sum_of(part); sum <= point; sum = sum_of(++part)) point -= sum;
    return part;
}

// The first level by the whole cluster, the others by every block for itself.
static __device__ int draw(const Cluster &cluster, const Candidates &c, float min_p, uint64_t uniform,
                           Shared &shared) {
    int begin = 0, length = c.vocab_size, warp = (int)threadIdx.x / kWarp, lane = (int)threadIdx.x % kWarp;
    int num_blocks = (int)cluster.num_blocks(), rank = (int)cluster.block_rank();
    uint64_t point = 0;  // how far into the mass of this part of the row
    for (bool is_first = true; length > 1; is_first = false) {
        int part = (length - 1) / (kWarps * num_blocks) + 1, own_part = rank * kWarps + warp;
        int first = begin + min(own_part * part, length), end = begin + min((own_part + 1) * part, length);
        uint64_t sum = 0;
        for_each_logit(c, first + lane, end, kWarp, [&](float logit) {
            float p = relative_probability(logit, c.largest, c.scale);
            if (order_of(logit) >= c.least && p >= min_p) sum += weight_of(p);
        });
        sum = warp_sum(sum);
        if (lane == 0) shared.warp_sums[warp] = sum;
        is_first ? cluster.sync() : __syncthreads();  // every part's sum visible
        int chosen = find_part(cluster, shared, num_blocks, is_first, uniform, point);
        begin += chosen * part;
        length = min(part, length - chosen * part);
        num_blocks = 1, rank = 0;
        is_first ? cluster.sync() : __syncthreads();  // the sums are read
    }
    return begin;
}

static __global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor)
    sample_kernel(int32_t *ids, const float *logits, const SampleRow *rows, int vocab_size) {
    __shared__ Shared shared;
    Cluster cluster = cooperative_groups::this_cluster();
    int index = (int)(blockIdx.x / cluster.num_blocks());
    const SampleRow &row = rows[index];
    Candidates c = {logits + (size_t)index * vocab_size, vocab_size, 0.0f, row.scale, 0};
    c.largest = c.logits[ids[index]];
    if (row.scale == 0.0f || !isfinite(c.largest)) return;  // all of a cluster, or none
    if (row.top_k > 0 && row.top_k < vocab_size)
        c.least = bound_for<false>(cluster, c, (uint64_t)row.top_k, 0, shared);
    if (row.top_p > 0) c.least = bound_for<true>(cluster, c, 0, row.top_p, shared);
    int token = draw(cluster, c, row.min_p, row.uniform, shared);
    cluster.sync();  // every thread has read the arg-max, and every block the others' memory
    if (cluster.thread_rank() == 0) ids[index] = token;
}

extern "C" Status cuda_sample(int32_t *ids, const float *logits, const SampleRow *rows, int num_rows,
                              int vocab_size, Stream stream) {
    if (num_rows == 0) return STATUS_OK;
    unsigned blocks = kMaxClusterBlocks;
    while (blocks > 1 && blocks * num_rows > kDeviceBlocks) blocks /= 2;
    cudaLaunchAttribute cluster = {};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {blocks, 1, 1};
    cudaLaunchConfig_t config = {};
    config.gridDim = {blocks * num_rows, 1, 1};
    config.blockDim = {kThreads, 1, 1};
    config.stream = (cudaStream_t)stream;
    config.attrs = &cluster;
    config.numAttrs = 1;
    return CUDA_STATUS(cudaLaunchKernelEx(&config, sample_kernel, ids, logits, rows, vocab_size));
}
