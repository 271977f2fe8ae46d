// argmax.cu -- the greedy token of each row of logits.
//
//   ids[r] = the lowest index among the largest logits[r, ..]; a NaN is larger than every number
//
// Shapes    logits [num_rows, vocab_size] float32; ids [num_rows]
// Rounding  none: comparisons
// Mapping   a cluster of eight thread blocks per row; each thread walks its stride, then a tree over warps and
//           blocks. The order of comparison is free, because (value, index) is a total order
// Cost      4 bytes per logit: latency-bound for few rows (one block a row: 21 us for a row of 128,256)
// See       twin/argmax.c, tests/kernels/test_bits_argmax.py

#include <cooperative_groups.h>

#include "../common/cuda_status.h"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

namespace cg = cooperative_groups;

constexpr int kBlocks = 8;      // of a row: the largest portable cluster
constexpr int kThreads = 1024;  // as many loads in flight as a block may have
constexpr int kWarps = kThreads / kWarp;
static_assert(kBlocks <= kWarp && kWarps <= kWarp, "a warp takes the results of all warps, of all blocks");

struct Candidate {
    float value;
    int index;
};

static __device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
    bool a_is_nan = a.value != a.value, b_is_nan = b.value != b.value;
    bool tie = a_is_nan ? b_is_nan : a.value == b.value;
    bool a_wins = tie ? a.index < b.index : a_is_nan || a.value > b.value;
    return a_wins ? a : b;
}

static __device__ __forceinline__ Candidate warp_best(Candidate best) {
#pragma unroll
    for (int offset = kWarp / 2; offset > 0; offset /= 2) {
        Candidate other = {__shfl_xor_sync(kFullWarp, best.value, offset),
                           __shfl_xor_sync(kFullWarp, best.index, offset)};
        best = better(best, other);
    }
    return best;
}

static __global__ void __cluster_dims__(kBlocks, 1, 1) __launch_bounds__(kThreads)
    argmax_kernel(int32_t *ids, const float *logits, int vocab_size) {
    __shared__ Candidate warp_results[kWarps];
    __shared__ Candidate block_result;
    cg::cluster_group cluster = cg::this_cluster();
    int row_index = (int)blockIdx.x / kBlocks, rank = (int)blockIdx.x % kBlocks;
    const float *row = logits + (size_t)row_index * vocab_size;
    const Candidate kNone = {__int_as_float(0xff800000),
                             INT32_MAX};  // loses to every candidate, -inf included
    Candidate best = kNone;
#pragma unroll 8
    for (int i = rank * kThreads + (int)threadIdx.x; i < vocab_size; i += kBlocks * kThreads)
        best = better(best, Candidate{row[i], i});
    best = warp_best(best);
    if (threadIdx.x % kWarp == 0) warp_results[threadIdx.x / kWarp] = best;
    __syncthreads();  // every warp's candidate visible to warp 0
    if (threadIdx.x < kWarp) {
        best = warp_best((int)threadIdx.x < kWarps ? warp_results[threadIdx.x] : kNone);
        if (threadIdx.x == 0) block_result = best;
    }
    cluster.sync();  // every block's candidate visible to the first
    if (rank == 0 && threadIdx.x < kWarp) {
        best =
            (int)threadIdx.x < kBlocks ? *cluster.map_shared_rank(&block_result, (int)threadIdx.x) : kNone;
        best = warp_best(best);
        if (threadIdx.x == 0) ids[row_index] = best.index;
    }
    cluster.sync();  // no block leaves before its candidate is read
}

extern "C" Status cuda_argmax(int32_t *ids, const float *logits, int num_rows, int vocab_size,
                              Stream stream) {
    if (num_rows == 0) return STATUS_OK;
    argmax_kernel<<<num_rows * kBlocks, kThreads, 0, (cudaStream_t)stream>>>(ids, logits, vocab_size);
    return CUDA_STATUS(cudaGetLastError());
}
