// decode_batch_whole.cu -- the linear layers of up to 64 sequences that have many rows: gate and up with
// SiLU, and the LM head with each token's best logit of a tile.
//
//   y[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// Shapes    x, act [num_seqs, columns]; logits [num_seqs, vocab_size] float32
// Rounding  docs/numerics.md sections 2 and 7
// Mapping   persistent thread blocks; a tile is two groups of 64 rows, gate's and up's or neighbours, by
//           all tokens. One thread fills a ring across tiles, two warpgroups multiply, a group each, and
//           write a tile while the next one is multiplied
// Cost      2 bytes per weight: memory-bound
// See       decode_batch_linear.cuh, decode_batch_many.cu, twin/linear.c, tests/kernels/test_bits_decode_batch.py

#include "decode_batch_linear.cuh"
#include "decode_candidate.cuh"
#include "silu.cuh"

constexpr int kGroups = 2;
constexpr int kConsumers = kGroups * kWarpgroup;
constexpr int kThreads = kConsumers + kWarp;  // the producer's warp is the last
constexpr int kConsumerWarps = kConsumers / kWarp;
constexpr int kActColumns = kGroupRows + kVector;        // of a staged row, padded
constexpr int kLogitColumns = kGroups * kGroupRows + 4;  // likewise
constexpr int kSharedBytes = 226 * 1024;
// Stages of weights asked for before the kernel before this one has ended; more would delay its reads.
constexpr int kStagesAhead = 3;

template <int kTokens>
using WholeStage = StageShape<kTokens, kGroups, 2>;

struct WholeArguments {
    CUtensorMap tokens;            // the rows of x
    CUtensorMap weights[kGroups];  // gate and up, or the LM head
    int k_tiles;
    int num_tiles;
    const BatchHeader *header;
    int num_stages;
    int num_rows;        // of each matrix
    bf16 *act;           // [num_seqs, num_rows]; or null, and the logits are wanted
    float *logits;       // [num_seqs, num_rows]
    float *best_values;  // [num_seqs, num_tiles]
    int *best_ids;
};

template <int kTokens>
constexpr int staged_bytes(bool is_logits) {
    return is_logits ? kTokens * kLogitColumns * (int)sizeof(float)
                     : kGroups * kTokens * kActColumns * (int)sizeof(bf16);
}

template <int kTokens, bool kIsLogits>
static __device__ __forceinline__ void produce(const WholeArguments &args, const Ring &ring) {
    uint64_t policy = evict_first_policy();
    using Stage = WholeStage<kTokens>;
    bool has_waited = false;
    int issued = 0, ahead = min(kStagesAhead, ring.num_stages),
        num_stages = own_stages<Stage>(args.k_tiles, 0, 1);
    RingPlace place;
    for (int tile = (int)blockIdx.x; tile < args.num_tiles; tile += (int)gridDim.x) {
        auto place_of = [&](int g) -> GroupPlace {
            if constexpr (kIsLogits) return {&args.weights[0], (tile * kGroups + g) * kGroupStrips};
            return {&args.weights[g], tile * kGroupStrips};
        };
        auto tiles_of = [&](int i) { return tiles_of_stage<Stage>(i, args.k_tiles, 0, 1); };
        for (int s = 0; s < num_stages; ++s, ++issued, place.advance(ring)) {
            if (issued >= ring.num_stages)
                barrier_wait(shared_address(&ring.empty[place.stage]), place.parity ^ 1);
            copy_weights<Stage>(ring, place.stage, tiles_of(s), policy, place_of);
            if (!has_waited && (issued + 1 == ahead || s + 1 == num_stages)) {
                wait_for_previous_kernel();
                has_waited = true;
                for (int i = 0; i < issued; ++i) copy_tokens<Stage>(ring, i, &args.tokens, 0, tiles_of(i));
            }
            if (has_waited) copy_tokens<Stage>(ring, place.stage, &args.tokens, 0, tiles_of(s));
        }
    }
}

// What is written of a staged tile: by each thread a share in so many units, one after another.
struct StagedTile {
    int index, num_seqs, thread;
};

// A unit of the tile's activations, from the staged gate and up: eight of them.
template <int kTokens>
static __device__ __forceinline__ void write_act(const WholeArguments &args, const bf16 *staged,
                                                 const StagedTile &tile, int unit) {
    int i = unit * kConsumers + tile.thread, token = i / kChunksPerRow, chunk = i % kChunksPerRow;
    if (token >= tile.num_seqs) return;
    float gate[kVector], up[kVector];
    unpack(gate, load_vector(staged + token * kActColumns + chunk * kVector));
    unpack(up, load_vector(staged + (kTokens + token) * kActColumns + chunk * kVector));
#pragma unroll
    for (int j = 0; j < kVector; ++j) gate[j] = silu_and_mul(gate[j], up[j]);
    size_t row = tile.index * kGroupRows + chunk * kVector;
    store_vector(args.act + (size_t)token * args.num_rows + row, pack(gate));
}

// A unit of the tile's logits, a token per warp; and the best of them.
template <int kTokens>
static __device__ __forceinline__ void write_logits(const WholeArguments &args, const float *staged,
                                                    const StagedTile &tile, int unit) {
    constexpr int kLaneRows = kGroups * kGroupRows / kWarp;
    int token = unit * kConsumerWarps + tile.thread / kWarp, lane = tile.thread % kWarp;
    int first_row = tile.index * kGroups * kGroupRows + lane * kLaneRows;
    if (token >= tile.num_seqs) return;
    float4 v = *reinterpret_cast<const float4 *>(staged + token * kLogitColumns + lane * kLaneRows);
    const float values[kLaneRows] = {v.x, v.y, v.z, v.w};
    float *to = args.logits + (size_t)token * args.num_rows + first_row;
    Candidate best = no_candidate();
    bool is_whole = args.num_rows % kLaneRows == 0 && first_row < args.num_rows;
    if (is_whole) *reinterpret_cast<float4 *>(to) = v;
#pragma unroll
    for (int j = 0; j < kLaneRows; ++j) {
        if (first_row + j >= args.num_rows) continue;
        if (!is_whole) to[j] = values[j];
        best.take_better(values[j], first_row + j);
    }
    best.take_best_of_warp();
    if (lane == 0) {
        size_t at = (size_t)token * args.num_tiles + tile.index;
        args.best_values[at] = best.value;
        args.best_ids[at] = best.id;
    }
}

template <int kTokens, bool kIsLogits>
static __device__ __forceinline__ void consume(const WholeArguments &args, const Ring &ring,
                                               unsigned char *staging, int thread) {
    constexpr int kUnits = kIsLogits ? kTokens / kConsumerWarps : kTokens * kChunksPerRow / kConsumers;
    int group = thread / kWarpgroup, member = thread % kWarpgroup;
    bf16 *staged_act = reinterpret_cast<bf16 *>(staging);
    float *staged_logits = reinterpret_cast<float *>(staging);
    RingPlace place;
    StagedTile staged = {0, args.header->num_seqs, thread};
    int unit = kUnits;  // of the staged tile, the next to write
    auto write_unit = [&](int) {
        if (unit == kUnits) return;
        if constexpr (kIsLogits) {
            write_logits<kTokens>(args, staged_logits, staged, unit);
        } else {
            write_act<kTokens>(args, staged_act, staged, unit);
        }
        ++unit;
    };
    for (int tile = (int)blockIdx.x; tile < args.num_tiles; tile += (int)gridDim.x) {
        float sum[kTokens / 2];
#pragma unroll
        for (int i = 0; i < kTokens / 2; ++i) sum[i] = -0.0f;  // adding to it changes no bit
        for (int first = 0; first < args.k_tiles; first += kTilesPerChunk) {
            float acc[kTokens / 2];
            multiply_chunk<WholeStage<kTokens>>(acc, ring, place, group,
                                                min(kTilesPerChunk, args.k_tiles - first), write_unit);
#pragma unroll
            for (int i = 0; i < kTokens / 2; ++i) sum[i] = __fadd_rn(sum[i], acc[i]);
        }
        while (unit < kUnits) write_unit(0);
        named_barrier_sync<1, kConsumers>();  // the tile before is written
#pragma unroll
        for (int f = 0; f < kTokens / 8; ++f) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int token = held_token(member, f, e), row = held_row(member, e);
                if constexpr (kIsLogits) {
                    staged_logits[token * kLogitColumns + group * kGroupRows + row] = sum[4 * f + e];
                } else {
                    staged_act[(group * kTokens + token) * kActColumns + row] = to_bf16(sum[4 * f + e]);
                }
            }
        }
        named_barrier_sync<1, kConsumers>();  // the staged values visible to every thread
        staged.index = tile;
        unit = 0;
    }
    while (unit < kUnits) write_unit(0);
}

template <int kTokens, bool kIsLogits>
static __global__ void __launch_bounds__(kThreads, 1)
    batch_whole_kernel(const __grid_constant__ WholeArguments args) {
    extern __shared__ unsigned char raw[];
    __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
    uint32_t start = shared_address(raw);
    uint32_t base = (start + kAlignment - 1) / kAlignment * kAlignment;
    Ring ring = {base, full, empty, args.num_stages};
    unsigned char *staging = raw + (base - start) + args.num_stages * WholeStage<kTokens>::kBytes;
    init_ring(ring, kConsumerWarps);
    __syncthreads();  // the barriers are there
    let_next_kernel_start();
    if (threadIdx.x < kConsumers) {
        wait_for_previous_kernel();
        consume<kTokens, kIsLogits>(args, ring, staging, (int)threadIdx.x);
    } else if (threadIdx.x == kConsumers) {
        produce<kTokens, kIsLogits>(args, ring);
    }
}

template <int kTokens, bool kIsLogits>
static Status launch_shape(const BatchStep &step, WholeArguments args,
                           const Matrix *const (&weights)[kGroups], cudaStream_t stream) {
    using Stage = WholeStage<kTokens>;
    constexpr int kRoom = kSharedBytes - kAlignment - staged_bytes<kTokens>(kIsLogits);
    for (int i = 0; i < kGroups; ++i)
        if (weights[i] != nullptr) TRY(encode_group_map<Stage>(&args.weights[i], *weights[i]));
    TRY(encode_rows_map(&args.tokens, step.buffers.normed, step.bucket, args.k_tiles * kTileCols, kTokens));
    args.num_stages = min(kMaxStages, kRoom / Stage::kBytes);
    size_t bytes = kAlignment + (size_t)args.num_stages * Stage::kBytes + staged_bytes<kTokens>(kIsLogits);
    unsigned blocks = (unsigned)min(args.num_tiles, step.num_multiprocessors);
    return launch_chained(batch_whole_kernel<kTokens, kIsLogits>, dim3(blocks), kThreads, bytes, 1, stream,
                          args);
}

template <bool kIsLogits>
static Status launch_whole(const BatchStep &step, WholeArguments args,
                           const Matrix *const (&weights)[kGroups], cudaStream_t stream) {
    args.header = step.buffers.header;
    args.k_tiles = num_tiles(weights[0]->cols);
    args.num_rows = weights[0]->rows;
    if (step.tile_tokens == 32) return launch_shape<32, kIsLogits>(step, args, weights, stream);
    return launch_shape<64, kIsLogits>(step, args, weights, stream);
}

Status launch_batch_gate_up(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    if (step.tile_tokens == kMostTokens) return launch_batch_gate_up_many(step, layer, stream);
    WholeArguments args = {};
    args.act = step.buffers.act;
    args.num_tiles = num_tiles(layer.gate_proj.rows);
    return launch_whole<false>(step, args, {&layer.gate_proj, &layer.up_proj}, stream);
}

int batch_vocabulary_tiles(int vocab_size) {
    return (num_tiles(vocab_size) + kGroups - 1) / kGroups;
}

Status launch_batch_head(const BatchStep &step, cudaStream_t stream) {
    const Matrix &head = step.problem.lm_head;
    if (step.tile_tokens == kMostTokens) return launch_batch_head_many(step, stream);
    WholeArguments args = {};
    args.logits = step.problem.logits;
    args.num_tiles = batch_vocabulary_tiles(head.rows);
    args.best_values = step.buffers.best_values;
    args.best_ids = step.buffers.best_ids;
    return launch_whole<true>(step, args, {&head, nullptr}, stream);
}
