// decode_batch_whole.cu -- the linear layers of a decode batch that have many rows: gate and up with SiLU,
// and the LM head with each token's best logit of a tile.
//
//   y[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// Shapes    x and act packed (decode_batch.cuh); logits [num_seqs, vocab_size] float32
// Rounding  docs/numerics.md sections 2 and 7
// Mapping   persistent thread blocks; a tile is two groups of 64 rows, gate's and up's or neighbours, by a
//           token tile. One warp fills a ring across tiles, two warpgroups multiply, a group each
// Cost      2 bytes per weight: memory-bound up to some hundred tokens
// See       decode_batch_linear.cuh, twin/linear.c, tests/kernels/test_bits_decode_batch.py

#include "../common/exp2.cuh"
#include "decode_batch_linear.cuh"
#include "decode_candidate.cuh"

constexpr int kGroups = 2;
constexpr int kConsumers = kGroups * kWarpgroup;
constexpr int kThreads = kWarpgroup + kConsumers;
constexpr int kProducerRegisters = 40;  // per thread; 128 x 40 + 256 x 232 are the multiprocessor's 65536
constexpr int kConsumerRegisters = 232;
constexpr int kActColumns = kGroupRows + kVector;        // of a staged row, padded
constexpr int kLogitColumns = kGroups * kGroupRows + 4;  // likewise
constexpr int kSharedBytes = 226 * 1024;

template <int kTokens>
using WholeStage = StageShape<kTokens, kGroups, kTokens == kMostTokens ? 2 : 4>;

struct WholeArguments {
    const bf16 *x;           // packed
    const bf16 *weights[2];  // gate and up, or the LM head and null
    int k_tiles;
    int num_groups;  // of 64 rows, of each matrix
    int num_tiles, token_tiles;
    const BatchHeader *header;
    int num_stages;
    bf16 *act;      // packed; or null, and the logits are wanted
    float *logits;  // [num_seqs, vocab_size]
    int vocab_size;
    float *best_values;  // [num_seqs, num_tiles / token_tiles]
    int *best_ids;
};

template <int kTokens>
constexpr int staged_bytes(bool is_logits) {
    return is_logits ? kTokens * kLogitColumns * (int)sizeof(float)
                     : kGroups * kTokens * kActColumns * (int)sizeof(bf16);
}

template <int kTokens>
static __device__ __forceinline__ void produce(const WholeArguments &args, const Ring &ring) {
    uint64_t policy = evict_first_policy();
    using Stage = WholeStage<kTokens>;
    bool has_waited = false;
    int issued = 0, num_stages = own_stages<Stage>(args.k_tiles, 0, 1);
    RingPlace place;
    for (int tile = (int)blockIdx.x; tile < args.num_tiles; tile += (int)gridDim.x) {
        int row_tile = tile / args.token_tiles, token_tile = tile % args.token_tiles;
        const bf16 *tokens = args.x + (size_t)token_tile * args.k_tiles * kTokens * kTileCols;
        auto group_data = [&](int g) {
            bool is_pair = args.weights[1] != nullptr;
            // A group beyond the last repeats it; its outputs are dropped.
            int group = is_pair ? row_tile : min(row_tile * kGroups + g, args.num_groups - 1);
            return args.weights[is_pair ? g : 0] +
                   (size_t)group * kGroupStrips * args.k_tiles * kStripValues;
        };
        auto tiles_of = [&](int i) { return tiles_of_stage<Stage>(i, args.k_tiles, 0, 1); };
        for (int s = 0; s < num_stages; ++s, ++issued, place.advance(ring)) {
            if (issued >= ring.num_stages)
                barrier_wait(shared_address(&ring.empty[place.stage]), place.parity ^ 1);
            copy_weights<Stage>(ring, place.stage, args.k_tiles, tiles_of(s), policy, group_data);
            if (!has_waited && (issued + 1 == ring.num_stages || s + 1 == num_stages)) {
                // The ring is full of weights; the tokens follow.
                wait_for_previous_kernel();
                has_waited = true;
                for (int i = 0; i < issued; ++i) copy_tokens<Stage>(ring, i, tokens, tiles_of(i));
            }
            if (has_waited) copy_tokens<Stage>(ring, place.stage, tokens, tiles_of(s));
        }
    }
}

__device__ __forceinline__ float silu_and_mul(float gate, float up) {
    float e = contract_exp2(__fmul_rn(-gate, __int_as_float(LOG2_E)));
    return __fmul_rn(to_float(to_bf16(__fdiv_rn(gate, __fadd_rn(1.0f, e)))), up);
}

// The tile's activations from the staged gate and up.
template <int kTokens>
static __device__ __forceinline__ void write_act(const WholeArguments &args, const bf16 *staged,
                                                 int row_tile, int token_tile, int num_seqs, int thread) {
    for (int i = thread; i < kTokens * kChunksPerRow; i += kConsumers) {
        int own = i / kChunksPerRow, chunk = i % kChunksPerRow, token = token_tile * kTokens + own;
        if (token >= num_seqs) break;
        float gate[kVector], up[kVector];
        unpack(gate, load_vector(staged + own * kActColumns + chunk * kVector));
        unpack(up, load_vector(staged + (kTokens + own) * kActColumns + chunk * kVector));
#pragma unroll
        for (int j = 0; j < kVector; ++j) gate[j] = silu_and_mul(gate[j], up[j]);
        store_vector(
            args.act + packed_row_offset(token, row_tile * kChunksPerRow + chunk, args.num_groups, kTokens),
            pack(gate));
    }
}

// The tile's logits, and each token's best of them; a warp per token.
template <int kTokens>
static __device__ __forceinline__ void write_logits(const WholeArguments &args, const float *staged,
                                                    int row_tile, int token_tile, int num_seqs,
                                                    int thread) {
    constexpr int kLaneRows = kGroups * kGroupRows / kWarp;
    int lane = thread % kWarp, first_row = row_tile * kGroups * kGroupRows + lane * kLaneRows;
    int num_row_tiles = args.num_tiles / args.token_tiles;
    for (int own = thread / kWarp; own < kTokens; own += kConsumers / kWarp) {
        int token = token_tile * kTokens + own;
        if (token >= num_seqs) break;
        float4 v = *reinterpret_cast<const float4 *>(staged + own * kLogitColumns + lane * kLaneRows);
        const float values[kLaneRows] = {v.x, v.y, v.z, v.w};
        float *to = args.logits + (size_t)token * args.vocab_size + first_row;
        Candidate best = no_candidate();
        bool is_whole = args.vocab_size % kLaneRows == 0 && first_row < args.vocab_size;
        if (is_whole) *reinterpret_cast<float4 *>(to) = v;
#pragma unroll
        for (int j = 0; j < kLaneRows; ++j) {
            if (first_row + j >= args.vocab_size) continue;
            if (!is_whole) to[j] = values[j];
            best.take_better(values[j], first_row + j);
        }
        best.take_best_of_warp();
        if (lane == 0) {
            args.best_values[(size_t)token * num_row_tiles + row_tile] = best.value;
            args.best_ids[(size_t)token * num_row_tiles + row_tile] = best.id;
        }
    }
}

template <int kTokens, bool kIsLogits>
static __device__ __forceinline__ void consume(const WholeArguments &args, const Ring &ring,
                                               unsigned char *staging, int thread) {
    int group = thread / kWarpgroup, member = thread % kWarpgroup;
    bf16 *staged_act = reinterpret_cast<bf16 *>(staging) + group * kTokens * kActColumns;
    float *staged_logits = reinterpret_cast<float *>(staging) + group * kGroupRows;
    RingPlace place;
    int num_seqs = args.header->num_seqs;
    for (int tile = (int)blockIdx.x; tile < args.num_tiles; tile += (int)gridDim.x) {
        float sum[kTokens / 2];
        for (int first = 0; first < args.k_tiles; first += kTilesPerChunk) {
            float acc[kTokens / 2];
            multiply_chunk<WholeStage<kTokens>>(acc, ring, place, group,
                                                min(kTilesPerChunk, args.k_tiles - first), member == 0);
#pragma unroll
            for (int i = 0; i < kTokens / 2; ++i) sum[i] = first == 0 ? acc[i] : __fadd_rn(sum[i], acc[i]);
        }
        named_barrier_sync<1, kConsumers>();  // the previous tile's staged values are read
#pragma unroll
        for (int f = 0; f < kTokens / 8; ++f) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                int token = held_token(member, f, e), row = held_row(member, e);
                if constexpr (kIsLogits) {
                    staged_logits[token * kLogitColumns + row] = sum[4 * f + e];
                } else {
                    staged_act[token * kActColumns + row] = to_bf16(sum[4 * f + e]);
                }
            }
        }
        named_barrier_sync<1, kConsumers>();  // the staged values visible to every thread
        int row_tile = tile / args.token_tiles, token_tile = tile % args.token_tiles;
        if constexpr (kIsLogits) {
            write_logits<kTokens>(args, reinterpret_cast<const float *>(staging), row_tile, token_tile,
                                  num_seqs, thread);
        } else {
            write_act<kTokens>(args, reinterpret_cast<const bf16 *>(staging), row_tile, token_tile,
                               num_seqs, thread);
        }
    }
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
    init_ring(ring, kGroups);
    __syncthreads();  // the barriers are there
    let_next_kernel_start();
    if (threadIdx.x < kWarpgroup) {
        give_registers<kProducerRegisters>();
        if (threadIdx.x < kWarp) produce<kTokens>(args, ring);
    } else {
        take_registers<kConsumerRegisters>();
        wait_for_previous_kernel();
        consume<kTokens, kIsLogits>(args, ring, staging, (int)threadIdx.x - kWarpgroup);
    }
}

template <int kTokens, bool kIsLogits>
static Status launch_whole_of(const BatchStep &step, WholeArguments args, cudaStream_t stream) {
    constexpr int kStageBytes = WholeStage<kTokens>::kBytes;
    constexpr int kRoom = kSharedBytes - kAlignment - staged_bytes<kTokens>(kIsLogits);
    args.num_stages = min(kMaxStages, kRoom / kStageBytes);
    size_t bytes = kAlignment + (size_t)args.num_stages * kStageBytes + staged_bytes<kTokens>(kIsLogits);
    unsigned blocks = (unsigned)min(args.num_tiles, step.num_multiprocessors);
    return launch_chained(batch_whole_kernel<kTokens, kIsLogits>, dim3(blocks), kThreads, bytes, 1, stream,
                          args);
}

template <bool kIsLogits>
static Status launch_whole(const BatchStep &step, WholeArguments args, int row_tiles, cudaStream_t stream) {
    args.x = step.buffers.normed;
    args.header = step.buffers.header;
    args.token_tiles = batch_token_tiles(step);
    args.num_tiles = row_tiles * args.token_tiles;
    if (step.tile_tokens == 32) return launch_whole_of<32, kIsLogits>(step, args, stream);
    if (step.tile_tokens == 64) return launch_whole_of<64, kIsLogits>(step, args, stream);
    return launch_whole_of<kMostTokens, kIsLogits>(step, args, stream);
}

Status launch_batch_gate_up(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    WholeArguments args = {};
    args.weights[0] = static_cast<const bf16 *>(layer.gate_proj.data);
    args.weights[1] = static_cast<const bf16 *>(layer.up_proj.data);
    args.k_tiles = num_tiles(layer.gate_proj.cols);
    args.num_groups = num_tiles(layer.gate_proj.rows);
    args.act = step.buffers.act;
    return launch_whole<false>(step, args, args.num_groups, stream);
}

int batch_vocabulary_tiles(int vocab_size) {
    return (num_tiles(vocab_size) + kGroups - 1) / kGroups;
}

Status launch_batch_head(const BatchStep &step, cudaStream_t stream) {
    const Matrix &head = step.problem.lm_head;
    WholeArguments args = {};
    args.weights[0] = static_cast<const bf16 *>(head.data);
    args.k_tiles = num_tiles(head.cols);
    args.num_groups = num_tiles(head.rows);
    args.logits = step.problem.logits;
    args.vocab_size = head.rows;
    args.best_values = step.buffers.best_values;
    args.best_ids = step.buffers.best_ids;
    return launch_whole<true>(step, args, batch_vocabulary_tiles(head.rows), stream);
}
