// decode_stream.cuh -- the producer of the persistent decode kernel: one warp that keeps the ring full.
//
// Its pieces come in the order in which the consumers take them; it waits for free slots and for
// earlier pieces to land, never for an activation. What it reads was written before the launch: weights,
// and keys and values of earlier steps.

#pragma once
#include "decode_task.cuh"

constexpr int kTilesPerChunk = NUMERICS_CHUNK / kTileCols;
constexpr int kSmallestBlock = 16;  // tokens of a KV block

// A phase's weights: up to three matrices one after another (q, k, v), or two side by side (gate, up), of
// whose rows a unit takes eight each.
struct PhaseWeights {
    const bf16 *first, *second, *third;
    int first_units, second_units, third_units;
    bool is_paired;

    __device__ int num_units() const { return first_units + second_units + third_units; }

    // Where part `part` of a unit starts in its packed matrix: its rows are contiguous (tile.cuh).
    __device__ const bf16 *unit_data(int unit, int part, int cols) const {
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

__device__ __forceinline__ PhaseWeights one_matrix(const Matrix &m) {
    return {packed_data(m), nullptr, nullptr, num_units(m), 0, 0, false};
}
__device__ __forceinline__ PhaseWeights qkv_weights(const DecodeLayer &layer) {
    return {packed_data(layer.q_proj),
            packed_data(layer.k_proj),
            packed_data(layer.v_proj),
            num_units(layer.q_proj),
            num_units(layer.k_proj),
            num_units(layer.k_proj),
            false};
}
__device__ __forceinline__ PhaseWeights gate_up_weights(const DecodeLayer &layer) {
    return {packed_data(layer.gate_proj),
            packed_data(layer.up_proj),
            nullptr,
            num_units(layer.gate_proj),
            0,
            0,
            true};
}

// One piece of contiguous bytes, by one lane.
template <typename Shared>
static __device__ __forceinline__ void stream_piece(Shared &shared, int piece, const bf16 *from, int bytes,
                                                    uint64_t policy) {
    uint32_t slot = wait_for_slot(shared, piece), full = full_barrier(shared, piece);
    barrier_arrive_expect(full, bytes);
    copy_bulk_with_policy(slot, from, bytes, full, policy);
}

// The block's pieces of one phase, in PhaseOrder, after the norm's weight if there is one; by one lane.
template <typename Shared>
static __device__ __forceinline__ int stream_phase(Shared &shared, int piece, const bf16 *norm,
                                                   const PhaseWeights &weights, int phase,
                                                   uint64_t policy) {
    const PhaseOrder order = shared.orders[phase];
    int first_block = (int)blockIdx.x - own_rank<Shared>();
    int last_unit = weights.num_units() - 1;
    if (norm) stream_piece(shared, piece++, norm, order.cols * (int)sizeof(bf16), policy);
#pragma unroll 1
    for (int first_unit = 0; first_unit < order.own_units; first_unit += order.units_per_round) {
        int end_unit = min(first_unit + order.units_per_round, order.own_units);
#pragma unroll 1
        for (int first_chunk = 0; first_chunk < order.own_chunks; first_chunk += order.chunks_per_group) {
            int end_chunk = min(first_chunk + order.chunks_per_group, order.own_chunks);
            int first_tile = chunk_of<Shared>(first_chunk) * kTilesPerChunk;
#pragma unroll 1
            for (int i = first_unit; i < end_unit; ++i) {
#pragma unroll 1
                for (int row = 0; row < order.parts * Shared::kCluster; ++row) {
                    // Of a cluster's block that has one unit fewer, the last one's weights are any.
                    int unit = min(first_block + i * (int)gridDim.x + row % Shared::kCluster, last_unit);
                    const bf16 *from = weights.unit_data(unit, row / Shared::kCluster, order.cols) +
                                       (size_t)first_tile * kStripValues;
                    int tiles = order.cols / kTileCols - first_tile;
#pragma unroll 1
                    for (int chunk = first_chunk; chunk < end_chunk; ++chunk, ++piece) {
                        stream_piece(shared, piece, from, min(kTilesPerChunk, tiles) * kStripBytes, policy);
                        from += Shared::kCluster * kTilesPerChunk * kStripValues;
                        tiles -= Shared::kCluster * kTilesPerChunk;
                    }
                }
            }
        }
    }
    return piece;
}

// K and V of the cached keys of the block's tasks, tile by tile; by the whole warp. Keys lie together in
// runs of a block or a piece, whichever is shorter; each lane keeps the addresses of two runs of the
// task.
template <typename Shared>
static __device__ __forceinline__ int stream_cache(Shared &shared, const StepArguments &args,
                                                   const KvLayer &cache, int piece) {
    constexpr int kLaneRuns = (kMaxRun * NUMERICS_TILE / kSmallestBlock + kWarp - 1) / kWarp;
    static_assert(kLaneRuns == 3, "as many are chosen from below");
    int lane = (int)threadIdx.x % kWarp, block_size = cache.block_size;
    int run_keys = min(kPieceKeys, block_size), runs = kPieceKeys / run_keys;  // of a piece
    int tile_runs = NUMERICS_TILE / kPieceKeys * runs;
    size_t to_values = (size_t)block_size * kTileCols;
    for_own_tasks(shared, args, first_task_cursor(shared, args), [&](const AttentionTask &task) {
        const int32_t *block_table = args.block_tables + (size_t)task.sequence * args.max_blocks_per_seq;
        const bf16 *run_data[kLaneRuns];
#pragma unroll
        for (int i = 0; i < kLaneRuns; ++i) {
            int run = i * kWarp + lane, own_tile = run / tile_runs;
            int key = task.tile_of(own_tile) * NUMERICS_TILE + (run - own_tile * tile_runs) * run_keys;
            int index = key / block_size, block = key < task.position ? block_table[index] : 0;
            run_data[i] = cache.data + kv_tile_offset(block, task.kv_head, cache.num_kv_heads, block_size) +
                          (size_t)(key - index * block_size) * kTileCols;
        }
        int first_run = 0;
#pragma unroll 1
        for (int i = 0; i < task.own_tiles; ++i) {
            int tile = task.tile_of(i);
            int cached = task.cached_keys(tile), halves = task.halves(tile);
#pragma unroll 1
            for (int is_value = 0; is_value < 2; ++is_value) {
#pragma unroll 1
                for (int half = 0; half < halves; ++half, ++piece) {
                    int keys = max(0, min(kPieceKeys, cached - half * kPieceKeys));
                    int run = first_run + half * runs;
                    auto data = reinterpret_cast<unsigned long long>(run < kWarp       ? run_data[0]
                                                                     : run < 2 * kWarp ? run_data[1]
                                                                                       : run_data[2]);
                    data = __shfl_sync(kFullWarp, data, (run + lane % runs) % kWarp);
                    const bf16 *from = reinterpret_cast<const bf16 *>(data) + (is_value ? to_values : 0);
                    int own_keys = min(run_keys, keys - lane * run_keys);
                    uint32_t slot = wait_for_slot(shared, piece), full = full_barrier(shared, piece);
                    if (lane == 0) barrier_arrive_expect(full, keys * kKeyBytes);
                    __syncwarp();  // the bytes are expected before the first arrive
                    if (lane < runs && own_keys > 0)
                        copy_bulk(slot + lane * run_keys * kKeyBytes, from, own_keys * kKeyBytes, full);
                }
            }
            first_run += tile_runs;
        }
    });
    return piece;
}

template <typename Shared>
static __device__ __forceinline__ void produce(Shared &shared, const StepArguments &args) {
    const DecodeProblem &problem = args.problem;
    // Weights are used once a step: they should not drive activations and tables out of the L2 cache.
    uint64_t once = evict_first_policy();
    bool is_elected = threadIdx.x % kWarp == 0;
    int piece = 0, num_phases = problem.num_layers * kPhaseHead + 1;
#pragma unroll 1
    for (int i = 0; i < num_phases; ++i) {
        const DecodeLayer &layer = args.layers[i / kPhaseHead];
        int phase = i == num_phases - 1 ? kPhaseHead : i % kPhaseHead;
        if (is_elected) {
            const bf16 *norm = phase == kPhaseQkv      ? layer.input_layernorm
                               : phase == kPhaseGateUp ? layer.post_attention_layernorm
                               : phase == kPhaseHead   ? problem.norm
                                                       : nullptr;
            PhaseWeights weights = one_matrix(problem.lm_head);
            if (phase == kPhaseQkv) weights = qkv_weights(layer);
            if (phase == kPhaseO) weights = one_matrix(layer.o_proj);
            if (phase == kPhaseGateUp) weights = gate_up_weights(layer);
            if (phase == kPhaseDown) weights = one_matrix(layer.down_proj);
            piece = stream_phase(shared, piece, norm, weights, phase, once);
        }
        if (phase != kPhaseQkv) continue;
        piece = __shfl_sync(kFullWarp, piece, 0);
        if (i == 0) wait_for_positions();
        piece = stream_cache(shared, args, layer.cache, piece);
    }
}
