// decode_step.cuh -- what the parts of the persistent decode kernel share: its problem, its shared memory,
// its clock.
//
// One thread block per multiprocessor runs a whole step. Twelve consumer warps compute; one producer warp
// streams the block's weights, for all layers and the LM head, through a ring in shared memory without ever
// waiting for an activation. The phases of a layer are separated by a barrier over the grid; the ring stays
// full across it, so the memory does not idle.

#pragma once
#include "../common/cuda_status.h"
#include "../common/exp2.cuh"
#include "../common/kv_tile.cuh"
#include "../common/numerics.h"
#include "../common/ptx.cuh"
#include "../common/vector.cuh"
extern "C" {
#include "kernels.h"
}

constexpr int kStepTokens = 8;      // most sequences of a step: the rows of one fragment
constexpr int kUnitRows = 8;        // weight rows of a unit of work: the columns of one fragment
constexpr int kConsumerWarps = 12;  // with the producer 13: up to 16 warps each may have 128 registers
constexpr int kConsumers = kConsumerWarps * kWarp;
constexpr int kStepThreads = kConsumers + kWarp;
constexpr int kMaxHidden = 2048;  // one pass of RMSNorm's 256 lanes
constexpr int kMaxGroup = 8;      // query heads per kv head
constexpr int kPieceBytes = kUnitRows * NUMERICS_CHUNK * (int)sizeof(bf16);  // a unit's chunk, 8 KiB
constexpr int kSlots = 22;       // of the ring: 176 KiB, five microseconds of this block's share of memory
constexpr int kRoundTasks = 64;  // chunk sums kept before they are added up
constexpr int kNormedStride = kMaxHidden + 8;   // 8 values of padding: rows start in different banks
constexpr int kPartialColumns = kTileCols + 2;  // 64 values, maximum, sum

struct StepShared {
    alignas(1024) unsigned char ring[kSlots][kPieceBytes];
    union {
        alignas(16) bf16 normed[kStepTokens * kNormedStride];
        struct {
            alignas(16) bf16 query[kMaxGroup][kTileCols];
            alignas(16) bf16 key[kTileCols];
            alignas(16) bf16 value[kTileCols];
            float tiles[NUMERICS_SEGMENT][kMaxGroup][kPartialColumns];
        } attention;
    };
    float sums[kRoundTasks][kStepTokens * kUnitRows];
    uint64_t full[kSlots];
    uint64_t empty[kSlots];
    int is_last;
};

// Waits until every thread block arrived; `target` is the arrivals expected so far, the same in every
// block.
struct GridBarrier {
    unsigned *counter;
    unsigned target;
};

__device__ __forceinline__ void consumer_barrier() {
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}

__device__ __forceinline__ void grid_barrier(GridBarrier &barrier) {
    barrier.target += gridDim.x;
    consumer_barrier();  // this block's stores are done before one thread speaks for it
    if (threadIdx.x == 0) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(barrier.counter) : "memory");
        unsigned seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                         : "=r"(seen)
                         : "l"(barrier.counter)
                         : "memory");
        } while (seen < barrier.target);
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }
    consumer_barrier();  // nobody reads other blocks' results before the barrier
}

// Loads of what other blocks wrote in this launch: past the L1 cache, which does not know of them.
__device__ __forceinline__ uint32_t load_fresh_pair(const bf16 *address) {
    return __ldcg(reinterpret_cast<const unsigned *>(address));
}
__device__ __forceinline__ uint4 load_fresh_vector(const bf16 *address) {
    return __ldcg(reinterpret_cast<const uint4 *>(address));
}

// A phase's weights: one matrix, or several one after another (q, k, v), or two side by side (gate, up).
struct PhaseWeights {
    const bf16 *data[3];
    int units[3];  // of each matrix; a unit is eight rows
    int num_matrices;
    bool is_paired;  // a unit takes eight rows of data[0] and the same of data[1]
    int cols;

    __device__ int num_units() const {
        return is_paired ? units[0]
                         : units[0] + (num_matrices > 1 ? units[1] : 0) + (num_matrices > 2 ? units[2] : 0);
    }
    __device__ int parts() const { return is_paired ? 2 : 1; }
    __device__ int num_chunks() const { return (cols + NUMERICS_CHUNK - 1) / NUMERICS_CHUNK; }
    __device__ int tasks_per_unit() const { return parts() * num_chunks(); }
    // How many units fall to this block: unit u goes to block u mod gridDim.
    __device__ int own_units() const {
        int all = num_units(), block = (int)blockIdx.x;
        return all > block ? (all - block + (int)gridDim.x - 1) / (int)gridDim.x : 0;
    }
    // Where part `part` of a unit starts in its packed matrix: its rows are contiguous (tile.cuh).
    __device__ const bf16 *unit_data(int unit, int part) const {
        int matrix = is_paired ? part : 0;
        if (!is_paired) {
            while (matrix < num_matrices - 1 && unit >= units[matrix]) unit -= units[matrix++];
        }
        return data[matrix] + packed_offset(unit * kUnitRows, 0, cols);
    }
};

__device__ __forceinline__ PhaseWeights one_matrix(const Matrix &m) {
    return {{static_cast<const bf16 *>(m.data), nullptr, nullptr},
            {(m.rows + kUnitRows - 1) / kUnitRows, 0, 0},
            1,
            false,
            m.cols};
}
__device__ __forceinline__ PhaseWeights qkv_weights(const DecodeLayer &layer) {
    return {{static_cast<const bf16 *>(layer.q_proj.data), static_cast<const bf16 *>(layer.k_proj.data),
             static_cast<const bf16 *>(layer.v_proj.data)},
            {layer.q_proj.rows / kUnitRows, layer.k_proj.rows / kUnitRows, layer.v_proj.rows / kUnitRows},
            3,
            false,
            layer.q_proj.cols};
}
__device__ __forceinline__ PhaseWeights gate_up_weights(const DecodeLayer &layer) {
    return {{static_cast<const bf16 *>(layer.gate_proj.data), static_cast<const bf16 *>(layer.up_proj.data),
             nullptr},
            {layer.gate_proj.rows / kUnitRows, 0, 0},
            2,
            true,
            layer.gate_proj.cols};
}
