// decode_step.cuh -- what the parts of the persistent decode kernel share: its problem, its shared memory,
// its barriers, the order of its work.
//
// One thread block per multiprocessor runs a whole step. Twelve consumer warps compute; one producer warp
// streams the block's weights, for all layers and the LM head, and the cached keys and values, through a
// ring in shared memory without ever waiting for an activation. The phases of a layer are separated by a
// barrier over the grid; the ring stays full across it, so the memory does not idle.

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
#include "decode_tile.cuh"

constexpr int kStepTokens = 8;         // most sequences of a step: the rows of one fragment
constexpr int kUnitRows = kStripRows;  // weight rows of a unit of work: the columns of one fragment
constexpr int kOutputs = kStepTokens * kUnitRows;  // of a unit
constexpr int kConsumerWarps = 12;  // with the producer 13: up to 16 warps may have 128 registers each
constexpr int kConsumers = kConsumerWarps * kWarp;
constexpr int kStepThreads = kConsumers + kWarp;
constexpr int kMaxLayers = 32;    // their pointers travel as kernel parameters, which hold 4 KiB and more
constexpr int kMaxHidden = 2048;  // one pass of RMSNorm's 256 lanes
constexpr int kMaxIntermediate = 16384;  // the chunk sums of down's two units a block must fit together
constexpr int kPieceBytes = kUnitRows * NUMERICS_CHUNK * (int)sizeof(bf16);  // a unit's chunk, 8 KiB
constexpr int kSlots = 22;  // of the ring: 176 KiB, five microseconds of this block's share of memory
// Pieces on their way at once, 56 KiB: enough for the bandwidth; more queue up before the barriers'
// traffic.
constexpr int kInFlight = 7;
constexpr int kTurns = 2 * kSlots;  // pieces between two uses of one `full` barrier
constexpr int kRoundTasks = 64;     // chunk sums kept before they are added up
constexpr int kInputPadding = 8;    // values: rows start in different banks
constexpr int kInputValues = kStepTokens * (kMaxHidden + kInputPadding);
constexpr int kNormGroups = NUMERICS_NORM_LANES / kWarp;
static_assert(kPieceBytes == kPieceKeys * kKeyBytes, "weights and keys share the ring");
constexpr int kStripBytes = kStripValues * (int)sizeof(bf16);

// The order of a phase's pieces within a block, the same for the producer and the consumers: rounds of
// units, in each the groups of chunks whose activations fit shared memory together, in each the round's
// units, in each its parts, in each the chunks.
struct PhaseOrder {
    int own_units;  // unit i of the block is unit blockIdx + i gridDim of the phase
    int units_per_round;
    int parts;  // matrices side by side: 2 for gate and up
    int num_chunks, chunks_per_group;
    int cols;
};
enum Phase { kPhaseQkv, kPhaseO, kPhaseGateUp, kPhaseDown, kPhaseHead, kNumPhases };

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
    alignas(16) float sums[kRoundTasks][kOutputs];
    alignas(16) float norm_sums[kStepTokens][kNormGroups];
    alignas(16) bf16 rope[kStepTokens][kTileCols];  // of each sequence's new position: cos | sin
    uint64_t full[kTurns];
    uint64_t empty[kSlots];
    PhaseOrder orders[kNumPhases];
    int positions[kStepTokens];  // of the new tokens
    unsigned arrivals_expected;  // at the grid barrier, in this launch
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
// parities. A slot has two `full` barriers and uses them by turns: a warp may come to wait for a piece
// while the slot's previous piece is still on its way, and the parity of one barrier could not tell that
// piece's predecessor from the one awaited.
__device__ __forceinline__ int slot_of(int piece) {
    return piece % kSlots;
}
__device__ __forceinline__ uint32_t full_barrier(StepShared &shared, int piece) {
    return shared_address(&shared.full[piece % kTurns]);
}
__device__ __forceinline__ uint32_t wait_for_piece(StepShared &shared, int piece) {
    barrier_wait(full_barrier(shared, piece), piece / kTurns & 1);
    return shared_address(shared.ring[slot_of(piece)]);
}
__device__ __forceinline__ void release_piece(StepShared &shared, int piece) {
    barrier_arrive(shared_address(&shared.empty[slot_of(piece)]));
}
// For the producer, before it asks for a piece: with it, at most kInFlight are on their way.
__device__ __forceinline__ uint32_t wait_for_slot(StepShared &shared, int piece) {
    if (piece >= kInFlight) wait_for_piece(shared, piece - kInFlight);
    barrier_wait(shared_address(&shared.empty[slot_of(piece)]), piece / kSlots & 1 ^ 1);
    return shared_address(shared.ring[slot_of(piece)]);
}

__device__ __forceinline__ void consumer_barrier() {
    named_barrier_sync<1, kConsumers>();
}

// The consumers tell the producer that shared.positions is written.
__device__ __forceinline__ void announce_positions() {
    named_barrier_arrive<2, kStepThreads>();
}
__device__ __forceinline__ void wait_for_positions() {
    named_barrier_sync<2, kStepThreads>();
}

// Waits until every thread block arrived. The arrivals expected so far are kept in shared memory: in a
// register they would be spilled, and fetched from afar in every turn of the loop.
__device__ __forceinline__ void grid_barrier(StepShared &shared, unsigned *counter) {
    consumer_barrier();  // this block's stores are done before one thread speaks for it
    if (threadIdx.x == 0) {
        fence_gpu();  // they are out before the arrival
        add_relaxed(counter, 1);
        unsigned target = shared.arrivals_expected += gridDim.x;
        while (load_acquire(counter) < target) {
        }
    }
    consumer_barrier();  // nobody reads other blocks' results before the barrier
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
__device__ __forceinline__ int own_share(int count) {
    int block = (int)blockIdx.x, blocks = (int)gridDim.x;
    return count > block ? (count - block + blocks - 1) / blocks : 0;
}

__device__ __forceinline__ const bf16 *packed_data(const Matrix &matrix) {
    return static_cast<const bf16 *>(matrix.data);
}
__device__ __forceinline__ int num_units(const Matrix &matrix) {
    return (matrix.rows + kUnitRows - 1) / kUnitRows;
}

__device__ __forceinline__ PhaseOrder phase_order(int units, int parts, int cols, int num_tokens) {
    PhaseOrder order;
    order.own_units = own_share(units);
    order.parts = parts;
    order.cols = cols;
    order.num_chunks = (cols + NUMERICS_CHUNK - 1) / NUMERICS_CHUNK;
    order.chunks_per_group =
        min(order.num_chunks, (kInputValues / num_tokens - kInputPadding) / NUMERICS_CHUNK);
    order.units_per_round = max(1, kRoundTasks / (parts * order.num_chunks));
    return order;
}

// The same in every layer.
static __device__ PhaseOrder order_of_phase(const StepArguments &args, int phase) {
    const DecodeLayer &layer = args.layers[0];
    int n = args.num_seqs;
    if (phase == kPhaseQkv)
        return phase_order(num_units(layer.q_proj) + 2 * num_units(layer.k_proj), 1, layer.q_proj.cols, n);
    if (phase == kPhaseO) return phase_order(num_units(layer.o_proj), 1, layer.o_proj.cols, n);
    if (phase == kPhaseGateUp) return phase_order(num_units(layer.gate_proj), 2, layer.gate_proj.cols, n);
    if (phase == kPhaseDown) return phase_order(num_units(layer.down_proj), 1, layer.down_proj.cols, n);
    return phase_order(num_units(args.problem.lm_head), 1, args.problem.lm_head.cols, n);
}

// One segment of one sequence and kv head: a block's task in the attention phase.

struct AttentionTask {
    int sequence, kv_head, segment;
    int position;      // of the new token
    int num_segments;  // of the sequence
    int first_tile, num_tiles;

    // Keys of a tile that are in the cache already, 0 .. 128.
    __device__ int cached_keys(int tile) const {
        return min(NUMERICS_TILE, position - tile * NUMERICS_TILE);
    }
    // Those and the new key.
    __device__ int num_keys(int tile) const {
        return min(NUMERICS_TILE, position - tile * NUMERICS_TILE + 1);
    }
    // Pieces of K, and of V, of a tile; one that holds the new key alone is empty on arrival.
    __device__ int halves(int tile) const { return (num_keys(tile) + kPieceKeys - 1) / kPieceKeys; }
    // K and V of each tile; only the last tile may have a single half.
    __device__ int num_pieces() const {
        return 2 * (2 * (num_tiles - 1) + halves(first_tile + num_tiles - 1));
    }
};

// Calls visit(task) for each task of this block, in one order for the producer and the consumers.
template <typename Visit>
static __device__ __forceinline__ void for_own_tasks(const StepShared &shared, const StepArguments &args,
                                                     Visit visit) {
    // The last blocks first: of weight rows they have the fewest.
    int next = (int)(gridDim.x - 1 - blockIdx.x), heads = args.problem.num_kv_heads;
#pragma unroll 1
    for (int sequence = 0; sequence < args.num_seqs; ++sequence) {
        int position = shared.positions[sequence];
        int num_segments = position / kSegmentKeys + 1, num_tasks = num_segments * heads;
#pragma unroll 1
        for (; next < num_tasks; next += (int)gridDim.x) {
            AttentionTask task;
            task.sequence = sequence;
            task.segment = next / heads;
            task.kv_head = next - task.segment * heads;
            task.position = position;
            task.num_segments = num_segments;
            task.first_tile = task.segment * NUMERICS_SEGMENT;
            task.num_tiles = min(NUMERICS_SEGMENT, position / NUMERICS_TILE + 1 - task.first_tile);
            visit(task);
        }
        next -= num_tasks;
    }
}
