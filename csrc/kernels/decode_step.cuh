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

constexpr int kStepTokens = 8;         // most sequences of a step: the rows of one fragment
constexpr int kUnitRows = kStripRows;  // weight rows of a unit of work: the columns of one fragment
constexpr int kConsumerWarps = 12;     // with the producer 13: up to 16 warps may have 128 registers each
constexpr int kConsumers = kConsumerWarps * kWarp;
constexpr int kStepThreads = kConsumers + kWarp;
constexpr int kMaxLayers = 32;    // their pointers travel as kernel parameters, which hold 4 KiB and more
constexpr int kMaxHidden = 2048;  // one pass of RMSNorm's 256 lanes
constexpr int kMaxGroup = 8;      // query heads per kv head
constexpr int kPieceBytes = kUnitRows * NUMERICS_CHUNK * (int)sizeof(bf16);  // a unit's chunk, 8 KiB
constexpr int kSlots = 22;        // of the ring: 176 KiB, five microseconds of this block's share of memory
constexpr int kRoundTasks = 64;   // chunk sums kept before they are added up
constexpr int kInputPadding = 8;  // values: rows start in different banks
constexpr int kInputValues = kStepTokens * (kMaxHidden + kInputPadding);
constexpr int kPartialColumns = kTileCols + 2;                             // 64 values, maximum, sum
constexpr int kPieceKeys = kPieceBytes / (kTileCols * (int)sizeof(bf16));  // 64: half an attention tile
constexpr int kStripBytes = kStripValues * (int)sizeof(bf16);

struct AttentionShared {
    alignas(16) bf16 query[kMaxGroup][kTileCols];
    alignas(16) bf16 key[kTileCols];
    alignas(16) bf16 value[kTileCols];
    float tiles[NUMERICS_SEGMENT][kMaxGroup][kPartialColumns];
};

struct StepShared {
    alignas(1024) unsigned char ring[kSlots][kPieceBytes];
    union {
        alignas(16) bf16 input[kInputValues];  // the activations a phase multiplies, row by row
        AttentionShared attention;
    };
    float sums[kRoundTasks][kStepTokens * kUnitRows];
    uint64_t full[2 * kSlots];  // by turns: see wait_for_piece
    uint64_t empty[kSlots];
    int is_last;
};

// The workspace: a counter for the grid barrier and one for the end.
struct StepCounters {
    unsigned arrivals;
    unsigned finished;
    unsigned padding[30];
};

struct StepArguments {
    DecodeProblem problem;
    DecodeLayer layers[kMaxLayers];
    int32_t *input_ids;           // [num_seqs], and the next three: written when `advance`
    int32_t *positions;           // [num_seqs]
    int32_t *seq_lens;            // [num_seqs]
    const int32_t *block_tables;  // [num_seqs, max_blocks_per_seq]
    int max_blocks_per_seq;
    int num_seqs;
    bool advance;
    float scale;  // of scores: log2(e) / sqrt(head_dim)
    StepCounters *counters;
    float *best_values;  // [gridDim, kStepTokens]
    int *best_ids;       // [gridDim, kStepTokens]
    unsigned *tickets;   // [num_seqs, num_kv_heads], zero between uses
    float *segments;     // [num_seqs, num_heads, max_segments, kPartialColumns]
    int max_segments;
};

// A block's stream of pieces: the producer and every consumer count alike, and so agree on slots and
// parities.
__device__ __forceinline__ int slot_of(int piece) {
    return piece % kSlots;
}
__device__ __forceinline__ int parity_of(int piece) {
    return piece / kSlots & 1;
}
__device__ __forceinline__ uint32_t wait_for_piece(StepShared &shared, int piece) {
    barrier_wait(shared_address(&shared.full[piece % (2 * kSlots)]), piece / (2 * kSlots) & 1);
    return shared_address(shared.ring[slot_of(piece)]);
}
__device__ __forceinline__ void release_piece(StepShared &shared, int piece) {
    barrier_arrive(shared_address(&shared.empty[slot_of(piece)]));
}

__device__ __forceinline__ void consumer_barrier() {
    asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory");
}

// Waits until every thread block arrived; `target` is the arrivals expected so far, the same in every
// block.
__device__ __forceinline__ void grid_barrier(unsigned *counter, unsigned &target) {
    target += gridDim.x;
    consumer_barrier();  // this block's stores are done before one thread speaks for it
    if (threadIdx.x == 0) {
        asm volatile("fence.acq_rel.gpu;" ::: "memory");
        asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
        unsigned seen;
        do {
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        } while (seen < target);
    }
    consumer_barrier();  // nobody reads other blocks' results before the barrier
}

// Loads of what other blocks wrote in this launch: past the L1 cache, which does not know of them.
__device__ __forceinline__ uint4 load_fresh_vector(const bf16 *address) {
    return __ldcg(reinterpret_cast<const uint4 *>(address));
}

// How `count` things are dealt to the blocks: thing i goes to block i mod gridDim.
__device__ __forceinline__ int own_share(int count) {
    int block = (int)blockIdx.x, blocks = (int)gridDim.x;
    return count > block ? (count - block + blocks - 1) / blocks : 0;
}

// A phase's weights: up to three matrices one after another (q, k, v), or two side by side (gate, up), of
// whose rows a unit takes eight each.
struct PhaseWeights {
    const bf16 *first, *second, *third;
    int first_units, second_units, num_units;
    int cols;
    bool is_paired;

    __device__ int parts() const { return is_paired ? 2 : 1; }
    __device__ int num_chunks() const { return (cols + NUMERICS_CHUNK - 1) / NUMERICS_CHUNK; }
    // Where part `part` of a unit starts in its packed matrix: its rows are contiguous (tile.cuh).
    __device__ const bf16 *unit_data(int unit, int part) const {
        const bf16 *data = first;
        if (is_paired) {
            if (part == 1) data = second;
        } else if (unit >= first_units + second_units) {
            data = third;
            unit -= first_units + second_units;
        } else if (unit >= first_units) {
            data = second;
            unit -= first_units;
        }
        return data + packed_offset(unit * kUnitRows, 0, cols);
    }
};

__device__ __forceinline__ const bf16 *packed_data(const Matrix &matrix) {
    return static_cast<const bf16 *>(matrix.data);
}
__device__ __forceinline__ PhaseWeights one_matrix(const Matrix &m) {
    int units = (m.rows + kUnitRows - 1) / kUnitRows;
    return {packed_data(m), nullptr, nullptr, units, 0, units, m.cols, false};
}
__device__ __forceinline__ PhaseWeights qkv_weights(const DecodeLayer &layer) {
    int q = layer.q_proj.rows / kUnitRows, k = layer.k_proj.rows / kUnitRows;
    return {packed_data(layer.q_proj),
            packed_data(layer.k_proj),
            packed_data(layer.v_proj),
            q,
            k,
            q + 2 * k,
            layer.q_proj.cols,
            false};
}
__device__ __forceinline__ PhaseWeights gate_up_weights(const DecodeLayer &layer) {
    int units = layer.gate_proj.rows / kUnitRows;
    return {packed_data(layer.gate_proj),
            packed_data(layer.up_proj),
            nullptr,
            units,
            0,
            units,
            layer.gate_proj.cols,
            true};
}

// The order of a phase's pieces within a block, the same for the producer and the consumers: groups of
// chunks whose activations fit shared memory together, in each the block's units, in each its parts, in
// each the chunks.
struct PhaseOrder {
    int own_units, parts, num_chunks, chunks_per_group, num_groups;

    __device__ PhaseOrder(const PhaseWeights &weights, int num_tokens)
        : own_units(own_share(weights.num_units)),
          parts(weights.parts()),
          num_chunks(weights.num_chunks()) {
        int fitting = (kInputValues / num_tokens - kInputPadding) / NUMERICS_CHUNK;
        chunks_per_group = min(num_chunks, fitting);
        num_groups = (num_chunks + chunks_per_group - 1) / chunks_per_group;
    }
    __device__ int group_chunks(int group) const {
        return min(chunks_per_group, num_chunks - group * chunks_per_group);
    }
};
