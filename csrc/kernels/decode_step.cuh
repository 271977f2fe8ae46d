// decode_step.cuh -- what the parts of the persistent decode kernel share: its problem, its shared memory,
// its barriers, the order of its work.
//
// One thread block per multiprocessor runs a whole step. Twelve consumer warps compute; one producer warp
// streams the block's weights, for all layers and the LM head, and the cached keys and values, through a
// ring in shared memory without ever waiting for an activation. The phases of a layer are separated by a
// barrier over the grid, which another warp keeps; meanwhile every consumer takes its first weights of the
// next phase out of the ring into registers, and the stream goes on.

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
#include "decode_grid.cuh"
#include "decode_tile.cuh"

constexpr int kStepTokens = 8;         // most sequences of a step: the rows of one fragment
constexpr int kFewTokens = 4;          // up to so many leave shared memory to a longer ring
constexpr int kClusterBlocks = 2;      // that share units; a sequence alone has less to read than to tell
constexpr int kUnitRows = kStripRows;  // weight rows of a unit of work: the columns of one fragment
constexpr int kProducerRegisters = 80;
constexpr int kConsumerRegisters = 144;
constexpr int kMaxLayers = 32;    // their pointers travel as kernel parameters, which hold 4 KiB and more
constexpr int kMaxHidden = 2048;  // one pass of RMSNorm's 256 lanes
constexpr int kMaxIntermediate = 16384;  // the chunk sums of down's two units a block must fit together
constexpr int kPieceBytes = kUnitRows * NUMERICS_CHUNK * (int)sizeof(bf16);  // a unit's chunk, 8 KiB
// Pieces on their way at once, 48 KiB: enough for the bandwidth; more queue up before the barriers'
// traffic.
constexpr int kInFlight = 6;
constexpr int kRoundTasks = 64;  // chunk sums kept before they are added up
constexpr int kRowPadding = 8;   // values: rows start in different banks
constexpr int kLeastRows = 4;    // of kInputChunks that fit shared memory: down's input of one token
constexpr int kTileWarps = 4;    // share an attention tile: 32 keys, then 16 columns each
constexpr int kTilesAtOnce = kConsumerWarps / kTileWarps;
constexpr int kMaxRun = NUMERICS_SEGMENT + 1;      // tiles of a task
constexpr int kLeastRun = 2;                       // tiles; a block works on one more at once
constexpr int kPartColumns = kPartialColumns + 2;  // of a part in memory: 64 values, maximum, sum, padding
constexpr int kFoldRows = 88;                      // a row's segments times heads that are folded together
constexpr int kNormGroups = NUMERICS_NORM_LANES / kWarp;
static_assert(kPieceBytes == kPieceKeys * kKeyBytes, "weights and keys share the ring");
constexpr int kStripBytes = kStripValues * (int)sizeof(bf16);

// The order of a phase's pieces within a block, the same for the producer and the consumers: rounds of
// units, in each the groups of chunks whose activations fit shared memory together, in each the round's
// units, in each its parts, in each the blocks of the cluster, whose units these are, in each the chunks.
struct PhaseOrder {
    int num_units;
    int own_units;  // unit i of the block is unit blockIdx + i gridDim of the phase, if there is one
    int units_per_round;
    int parts;                                     // matrices side by side: 2 for gate and up
    int num_chunks, own_chunks, chunks_per_group;  // chunk i of the block is i kCluster + its rank
    int cols;
    int early_cols;  // of the input, that are there before the rest: outputs of gate/up's first round
};
enum Phase { kPhaseQkv, kPhaseO, kPhaseGateUp, kPhaseDown, kPhaseHead, kNumPhases };

// How a row is cut, the attention of one sequence by one kv head: into runs of tiles, a block's task each.
// A row of one segment is not cut: what a block leaves to another costs more than it saves. Runs are as
// short as leaves no block with two, at most a segment, and of one length within a row, but for the first
// few, which have a tile more. A run that is not the whole row leaves parts: of a segment its fold, else
// each tile as it is.
struct RowPlan {
    int num_runs, run_tiles, longer_runs;
    int num_parts;
    bool is_by_segments;

    __device__ int first_tile(int run) const { return run * run_tiles + min(run, longer_runs); }
};

// Where a walk through the tasks of all rows is: `next` counts from the first of this row.
struct TaskCursor {
    int sequence, next;
    int first_part;  // of the row
};

struct AttentionShared {
    alignas(16) bf16 query[kMaxGroup][kTileCols + kRowPadding];
    alignas(16) bf16 key[kTileCols];
    alignas(16) bf16 value[kTileCols];
    // P of the tiles at work, and the maxima of each warp's keys.
    alignas(16) bf16 weights[kTilesAtOnce][kMaxGroup][NUMERICS_TILE + kRowPadding];
    alignas(16) float maxima[kTilesAtOnce][kMaxGroup][kTileWarps];
    union {
        // Results of the task's tiles, and of a row's segments, each head's.
        alignas(16) float tiles[kMaxRun][kMaxGroup][kPartialColumns];
        float folds[kFoldRows][kPartColumns];
    };
};

// Of a block, in a step of up to kMostTokens sequences: what fewer tokens leave is the ring's. The blocks of
// a cluster share the units of all: each multiplies its own chunks of the tokens, which it alone reads.
template <int kMostTokens, int kClusterSize>
struct StepShared {
    static constexpr int kTokens = kMostTokens, kCluster = kClusterSize;
    static_assert(kTokens > 1 || kCluster == 1, "one token's rows are copied whole");
    static constexpr int kOutputs = kTokens * kUnitRows;  // of a unit
    // Of the ring: 168 to 192 KiB, five microseconds of this block's share of memory.
    static constexpr int kSlots = kTokens > kFewTokens ? 21 : kTokens > 1 ? 23 : 24;
    static constexpr int kTurns = 2 * kSlots;  // pieces between two uses of one `full` barrier
    // For down at Llama 3.2 1B's shape: a block's chunks among the outputs of gate/up's first round.
    static constexpr int kInputChunks = kCluster > 1 ? 5 : kMaxHidden / NUMERICS_CHUNK;
    static constexpr int kInputValues =
        (kTokens > kLeastRows ? kTokens : kLeastRows) * kInputChunks * NUMERICS_CHUNK;

    alignas(1024) unsigned char ring[kSlots][kPieceBytes];
    union {
        alignas(128) bf16 input[kInputValues];  // the activations a phase multiplies: row_place
        AttentionShared attention;
    };
    alignas(16) float sums[kRoundTasks][kOutputs];
    alignas(16) float norm_sums[kTokens][kNormGroups];
    alignas(16) bf16 rope[kTokens][kTileCols];  // of each sequence's new position: cos | sin
    uint64_t full[kTurns];
    uint64_t empty[kSlots];
    // Of exchanges within the cluster: a norm's sums and a round's chunk sums are here, and the round's are
    // added wherever this block's went.
    uint64_t norm_here, sums_here, sums_added;
    uint64_t input_here;  // what was asked for last
    // A task's tiles are at its cluster's first block, and are folded there.
    uint64_t tiles_here, tiles_folded;
    PhaseOrder orders[kNumPhases];
    int positions[kTokens];  // of the new tokens
    RowPlan plans[kTokens];
    TaskCursor first_task;
    int team;  // blocks that share an attention task: the cluster's, or each has its own
    int is_last;
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
    float *parts;        // [parts of all rows, group, kPartColumns]: RowPlan
};

// A block's stream of pieces: the producer and every consumer count alike, and so agree on slots and
// parities. A slot has two `full` barriers and uses them by turns: a warp may come to wait for a piece
// while the slot's previous piece is still on its way, and the parity of one barrier could not tell that
// piece's predecessor from the one awaited.
template <typename Shared>
__device__ __forceinline__ unsigned char *slot_of(Shared &shared, int piece) {
    return shared.ring[piece % Shared::kSlots];
}
template <typename Shared>
__device__ __forceinline__ uint32_t empty_barrier(Shared &shared, int piece) {
    return shared_address(&shared.empty[piece % Shared::kSlots]);
}
template <typename Shared>
__device__ __forceinline__ uint32_t full_barrier(Shared &shared, int piece) {
    return shared_address(&shared.full[piece % Shared::kTurns]);
}
template <typename Shared>
__device__ __forceinline__ uint32_t wait_for_piece(Shared &shared, int piece) {
    barrier_wait(full_barrier(shared, piece), piece / Shared::kTurns & 1);
    return shared_address(slot_of(shared, piece));
}
template <typename Shared>
__device__ __forceinline__ void release_piece(Shared &shared, int piece) {
    barrier_arrive(empty_barrier(shared, piece));
}
// For the producer, before it asks for a piece: with it, at most kInFlight are on their way.
template <typename Shared>
__device__ __forceinline__ uint32_t wait_for_slot(Shared &shared, int piece) {
    if (piece >= kInFlight) wait_for_piece(shared, piece - kInFlight);
    barrier_wait(empty_barrier(shared, piece), piece / Shared::kSlots & 1 ^ 1);
    return shared_address(slot_of(shared, piece));
}

// threadIdx.x, read again where it is used: what a phase derives from it does not occupy registers through
// the other phases.
__device__ __forceinline__ int own_thread() {
    int thread;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    __builtin_assume(thread >= 0);
    return thread;
}

// Loads of what other blocks wrote in this launch: past the L1 cache, which does not know of them.
__device__ __forceinline__ uint4 load_fresh_vector(const bf16 *address) {
    return __ldcg(reinterpret_cast<const uint4 *>(address));
}

// How `count` things are dealt to the blocks: thing i goes to block i mod gridDim.
__device__ __forceinline__ int share_of(int block, int count) {
    int blocks = (int)gridDim.x;
    return count > block ? (count - block + blocks - 1) / blocks : 0;
}

// This block's place in its cluster.
template <typename Shared>
__device__ __forceinline__ int own_rank() {
    return Shared::kCluster == 1 ? 0 : (int)blockIdx.x % Shared::kCluster;
}
template <typename Shared>
__device__ __forceinline__ int chunk_of(int own_chunk) {
    return own_chunk * Shared::kCluster + own_rank<Shared>();
}

__device__ __forceinline__ const bf16 *packed_data(const Matrix &matrix) {
    return static_cast<const bf16 *>(matrix.data);
}
__device__ __forceinline__ int num_units(const Matrix &matrix) {
    return (matrix.rows + kUnitRows - 1) / kUnitRows;
}

template <typename Shared>
__device__ __forceinline__ PhaseOrder phase_order(int units, int parts, int cols, int num_tokens) {
    PhaseOrder order;
    // As many as the cluster's first block has: where another has one fewer, that one's sums are not used.
    order.own_units = share_of((int)blockIdx.x - own_rank<Shared>(), units);
    order.num_units = units;
    order.parts = parts;
    order.cols = cols;
    order.num_chunks = (cols + NUMERICS_CHUNK - 1) / NUMERICS_CHUNK;
    order.own_chunks = (order.num_chunks + Shared::kCluster - 1 - own_rank<Shared>()) / Shared::kCluster;
    order.chunks_per_group = min(order.own_chunks, Shared::kInputValues / (num_tokens * NUMERICS_CHUNK));
    order.units_per_round = max(1, kRoundTasks / (parts * order.num_chunks));
    order.early_cols = cols;
    return order;
}

// The same in every layer.
template <typename Shared>
static __device__ PhaseOrder order_of_phase(const StepArguments &args, int phase) {
    const DecodeLayer &layer = args.layers[0];
    int n = args.num_seqs;
    if (phase == kPhaseQkv)
        return phase_order<Shared>(num_units(layer.q_proj) + 2 * num_units(layer.k_proj), 1,
                                   layer.q_proj.cols, n);
    if (phase == kPhaseO) return phase_order<Shared>(num_units(layer.o_proj), 1, layer.o_proj.cols, n);
    if (phase == kPhaseGateUp || phase == kPhaseDown) {
        PhaseOrder gate_up = phase_order<Shared>(num_units(layer.gate_proj), 2, layer.gate_proj.cols, n);
        int most_units = (num_units(layer.gate_proj) + (int)gridDim.x - 1) / (int)gridDim.x;
        gate_up.units_per_round = min(gate_up.units_per_round, most_units - most_units * 3 / 8);
        if (phase == kPhaseGateUp) return gate_up;
        PhaseOrder down = phase_order<Shared>(num_units(layer.down_proj), 1, layer.down_proj.cols, n);
        down.early_cols = min(down.cols, gate_up.units_per_round * (int)gridDim.x * kUnitRows);
        down.chunks_per_group =
            min(down.chunks_per_group, max(1, down.early_cols / (NUMERICS_CHUNK * Shared::kCluster)));
        return down;
    }
    return phase_order<Shared>(num_units(args.problem.lm_head), 1, args.problem.lm_head.cols, n);
}

// Where a token's value stands among the rows that a phase multiplies: chunk by chunk, in each token by token,
// so that a block's chunk is one copy. 16 bytes of a tile of 64 columns stand where the token says, so that
// eight tokens' are in different banks.
__device__ __forceinline__ int chunk_width(int cols, int chunk) {
    return min(NUMERICS_CHUNK, cols - chunk * NUMERICS_CHUNK);
}
__device__ __forceinline__ int place_in_chunk(int token, int column, int width) {
    return token * width + ((column / kVector ^ token % 8) * kVector | column % kVector);
}
__device__ __forceinline__ size_t row_place(int num_tokens, int token, int column, int cols) {
    int chunk = column / NUMERICS_CHUNK;
    return (size_t)chunk * num_tokens * NUMERICS_CHUNK +
           place_in_chunk(token, column % NUMERICS_CHUNK, chunk_width(cols, chunk));
}
