// decode_batch_split.cu -- the linear layers of a decode batch that have few rows: O and down with the residual
// addition, and of more than 64 sequences q, k and v with RoPE and the cache write. Where tiles are few,
// several thread blocks share out K.
//
//   y[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// Shapes    x [num_seqs, columns]; q [num_seqs, num_heads, 64]; residual [num_seqs, hidden_size]
// Rounding  docs/numerics.md sections 2, 6 and 7: y to bf16 before RoPE and before the addition
// Mapping   1 to 8 thread blocks per 64 rows (128 where tokens are many) and token tile; block r computes
//           chunks r, r + ranks, .. and adds up the chunk sums of its share of the tokens. One thread fills
//           a ring, one or two warpgroups multiply
// Cost      2 bytes per weight: memory-bound up to some hundred tokens
// See       decode_batch_exchange.cuh, twin/linear.c, tests/kernels/test_bits_decode_batch.py

#include "decode_batch_exchange.cuh"
#include "decode_batch_pair.cuh"

constexpr int kSharedBytes = 226 * 1024;
// Stages of weights asked for before the kernel before this one has ended. With few tokens they do not
// delay what that one still reads.
template <typename Shape>
constexpr int kStagesAhead = Shape::kTokens == 32 ? 4 : 2;
// Chunks of a layer of which no block shares a tile of 32 tokens: with more, bringing the weights to every
// such tile takes longer than sharing (down at 128 tokens 30.5 us for 18.2: docs/log.md).
constexpr int kMostUnshared = 4;

struct SplitArguments {
    CUtensorMap tokens;      // the rows of x
    CUtensorMap weights[3];  // q, k, v; or one
    int num_groups;          // of all
    int k_tiles, num_chunks;
    int num_stages;
    int token_tiles;
    bool may_look_ahead;  // what a pair needs is there before the kernel before this one has ended
    float4 *sums;         // of all tiles' chunks: decode_batch_exchange.cuh
    unsigned *arrivals;   // [tiles], zero between uses
    PairArguments pairs;
};

static __device__ __forceinline__ GroupPlace group_place(const SplitArguments &args, int group) {
    if (args.pairs.output == kResidualOutput) return {&args.weights[0], group * kGroupStrips};
    HeadPlace place = args.pairs.head_place(group);
    return {&args.weights[place.matrix], place.head * kGroupStrips};
}

template <typename Shape>
static __device__ __forceinline__ void produce(const SplitArguments &args, const Ring &ring,
                                               const Exchange &exchange, int row_tile, int token_tile) {
    using Stage = typename Shape::Stage;
    uint64_t policy = evict_first_policy();
    int count = own_stages<Stage>(args.k_tiles, exchange.rank, Shape::kRanks);
    int ahead = min(count, min(kStagesAhead<Shape>, ring.num_stages));
    auto place_of = [&](int g) { return group_place(args, row_tile * Shape::kGroups + g); };
    auto tiles_of = [&](int i) {
        return tiles_of_stage<Stage>(i, args.k_tiles, exchange.rank, Shape::kRanks);
    };
    for (int i = 0; i < ahead; ++i) copy_weights<Stage>(ring, i, tiles_of(i), policy, place_of);
    prefetch_map(&args.tokens);
    wait_for_previous_kernel();
    for (int i = 0; i < ahead; ++i) copy_tokens<Stage>(ring, i, &args.tokens, token_tile, tiles_of(i));
    RingPlace place = {ahead % ring.num_stages, ahead == ring.num_stages};
    for (int i = ahead; i < count; ++i, place.advance(ring)) {
        barrier_wait(shared_address(&ring.empty[place.stage]), place.parity ^ 1);
        copy_weights<Stage>(ring, place.stage, tiles_of(i), policy, place_of);
        copy_tokens<Stage>(ring, place.stage, &args.tokens, token_tile, tiles_of(i));
    }
    if constexpr (Shape::kRanks > 1) {
        exchange.await<Shape>();
        copy_parts<Shape>(ring, place, exchange);
        exchange.leave<Shape>();
    }
}

// A group's 64 rows of this block's tokens: what of it a thread of its warpgroup writes, and where.
template <typename Shape>
struct GroupWriter {
    static constexpr int kPairs = Shape::kFragments * 8 * kChunksPerRow / 2;
    static constexpr int kOwnPairs = (kPairs + kWarpgroup - 1) / kWarpgroup;
    int group, member;
    Pair pairs[kOwnPairs];

    __device__ __forceinline__ GroupWriter(const SplitArguments &args, int row_group, int first_token,
                                           int thread)
        : group(row_group), member(thread) {
        int num_seqs = args.pairs.header->num_seqs;
#pragma unroll
        for (int i = 0; i < kOwnPairs; ++i) {
            int index = i * kWarpgroup + member, token = first_token + own_token(index);
            pairs[i].low = nullptr;
            if (index >= kPairs || token >= num_seqs || group >= args.num_groups) continue;
            int chunk = own_chunk(index), column = group * kGroupRows + chunk * kVector;
            pairs[i] = args.pairs.output == kResidualOutput
                           ? residual_pair(args.pairs, token, column, column + kGroupRows / 2)
                           : head_pair(args.pairs, token, group, chunk);
        }
    }
    static __device__ __forceinline__ int own_token(int index) { return index / (kChunksPerRow / 2); }
    static __device__ __forceinline__ int own_chunk(int index) { return index % (kChunksPerRow / 2); }

    __device__ __forceinline__ void write(const SplitArguments &args,
                                          const float (&sums)[Shape::kFragments][4], bf16 *staging) const {
#pragma unroll
        for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                staging[held_token(member, f, e) * kStagedColumns + held_row(member, e)] =
                    to_bf16(sums[f][e]);
        }
        // The staged rows visible to the group's threads.
        if (Shape::kGroups == 1 || group % 2 == 0) {
            named_barrier_sync<1, kWarpgroup>();
        } else {
            named_barrier_sync<2, kWarpgroup>();
        }
#pragma unroll
        for (int i = 0; i < kOwnPairs; ++i) {
            int index = i * kWarpgroup + member;
            if (pairs[i].low == nullptr) continue;
            const bf16 *from = staging + own_token(index) * kStagedColumns + own_chunk(index) * kVector;
            write_pair(args.pairs, group, pairs[i], load_vector(from), load_vector(from + kGroupRows / 2));
        }
    }
};

template <typename Shape>
static __global__ void __launch_bounds__(Shape::kThreads, 1)
    batch_split_kernel(const __grid_constant__ SplitArguments args) {
    extern __shared__ unsigned char raw[];
    __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
    int thread = (int)threadIdx.x, tile = (int)blockIdx.x / Shape::kRanks;
    int row_tile = tile / args.token_tiles, token_tile = tile % args.token_tiles;
    uint32_t start = shared_address(raw), base = (start + kAlignment - 1) / kAlignment * kAlignment;
    Ring ring = {base, full, empty, args.num_stages};
    Exchange exchange = {args.sums + (size_t)tile * args.num_chunks * Shape::kRanks * Shape::kPartVectors,
                         args.arrivals + tile, args.num_chunks, (int)blockIdx.x % Shape::kRanks};
    init_ring(ring, Shape::kConsumers / kWarp);
    __syncthreads();  // the barriers are there
    if (thread >= Shape::kConsumers) {
        if constexpr (Shape::kGroups == 2) give_registers<kProducerRegisters>();
        if (thread == Shape::kConsumers) produce<Shape>(args, ring, exchange, row_tile, token_tile);
    } else {
        if constexpr (Shape::kGroups == 2) take_registers<kConsumerRegisters>();
        if (!args.may_look_ahead) wait_for_previous_kernel();
        int group = thread / kWarpgroup;
        int first_token = token_tile * Shape::kTokens + exchange.rank * Shape::kFragments * 8;
        GroupWriter<Shape> writer(args, row_tile * Shape::kGroups + group, first_token,
                                  thread % kWarpgroup);
        wait_for_previous_kernel();
        // Not before: kernels that follow read the header, the cache and the residual without waiting.
        let_next_kernel_start();
        float sums[Shape::kFragments][4];
        consume<Shape>(sums, args.k_tiles, ring, exchange, thread);
        unsigned char *staging = raw + (base - start) + args.num_stages * Shape::Stage::kBytes;
        writer.write(args, sums, reinterpret_cast<bf16 *>(staging) + group * Shape::kStagedValues);
    }
}

template <typename Shape>
static Status launch_shape(const BatchStep &step, SplitArguments args, const bf16 *x,
                           const Matrix *const (&weights)[3], int tiles, cudaStream_t stream) {
    using Stage = typename Shape::Stage;
    constexpr int kStagedBytes = Shape::kGroups * Shape::kStagedValues * (int)sizeof(bf16);
    TRY(encode_rows_map(&args.tokens, x, step.bucket, weights[0]->cols, Shape::kTokens));
    for (int i = 0; i < 3; ++i)
        if (weights[i] != nullptr) TRY(encode_group_map<Stage>(&args.weights[i], *weights[i]));
    // No more than a block has to bring: what is left of the shared memory is the next kernel's.
    args.num_stages = min(own_stages<Stage>(args.k_tiles, 0, Shape::kRanks),
                          min(kMaxStages, (kSharedBytes - kAlignment - kStagedBytes) / Stage::kBytes));
    size_t bytes = kAlignment + (size_t)args.num_stages * Stage::kBytes + kStagedBytes;
    return launch_chained(batch_split_kernel<Shape>, dim3((unsigned)(tiles * Shape::kRanks)),
                          Shape::kThreads, bytes, 1, stream, args);
}

// A block for each tile of 64 rows, which shares it with nobody.
template <int kTokens>
static Status launch_unshared(const BatchStep &step, SplitArguments args, const bf16 *x,
                              const Matrix *const (&weights)[3], cudaStream_t stream) {
    args.token_tiles = step.bucket / kTokens;
    return launch_shape<SplitShape<kTokens, 1>>(step, args, x, weights, args.num_groups * args.token_tiles,
                                                stream);
}

// The most blocks a tile for which every block has a place and a chunk; two where that cannot be.
template <int kTokens>
static Status launch_shared(const BatchStep &step, const SplitArguments &args, const bf16 *x,
                            const Matrix *const (&weights)[3], cudaStream_t stream) {
    using Four = SplitShape<kTokens, 4>;
    int tiles = (args.num_groups + Four::kGroups - 1) / Four::kGroups * args.token_tiles;
    auto fits = [&](int ranks) {
        return tiles * ranks <= step.num_multiprocessors && ranks <= args.num_chunks;
    };
    if constexpr (kTokens == kMostTokens) {
        if (fits(8)) return launch_shape<SplitShape<kTokens, 8>>(step, args, x, weights, tiles, stream);
    }
    if (fits(4)) return launch_shape<Four>(step, args, x, weights, tiles, stream);
    return launch_shape<SplitShape<kTokens, 2>>(step, args, x, weights, tiles, stream);
}

static Status launch_split(const BatchStep &step, SplitArguments args, const bf16 *x,
                           const Matrix *const (&weights)[3], cudaStream_t stream) {
    args.k_tiles = num_tiles(weights[0]->cols);
    args.num_chunks = (args.k_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
    args.token_tiles = batch_token_tiles(step);
    args.sums = step.buffers.sums;
    args.arrivals = step.buffers.arrivals;
    // Whether blocks of so many tokens each occupy more than half the multiprocessors; and whether each has
    // one.
    auto occupy = [&](int tokens) {
        return tokens <= step.bucket &&
               2 * args.num_groups * (step.bucket / tokens) > step.num_multiprocessors;
    };
    auto have_room = [&](int tokens) {
        return args.num_groups * (step.bucket / tokens) <= step.num_multiprocessors;
    };
    if (args.num_chunks <= kMostUnshared && occupy(32) && have_room(32))
        return launch_unshared<32>(step, args, x, weights, stream);
    if (occupy(64) && have_room(64)) return launch_unshared<64>(step, args, x, weights, stream);
    if (occupy(kMostTokens)) return launch_unshared<kMostTokens>(step, args, x, weights, stream);
    if (step.tile_tokens == 32) return launch_shared<32>(step, args, x, weights, stream);
    if (step.tile_tokens == 64) return launch_shared<64>(step, args, x, weights, stream);
    return launch_shared<kMostTokens>(step, args, x, weights, stream);
}

Status launch_batch_qkv_many(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    SplitArguments args = {};
    args.num_groups = step.problem.num_heads + 2 * step.problem.num_kv_heads;
    args.pairs = qkv_pairs(step, layer);
    args.may_look_ahead = may_qkv_look_ahead(step, layer);
    return launch_split(step, args, step.buffers.normed, {&layer.q_proj, &layer.k_proj, &layer.v_proj},
                        stream);
}

static Status launch_residual(const BatchStep &step, const Matrix &weight, const bf16 *x,
                              bool may_look_ahead, cudaStream_t stream) {
    SplitArguments args = {};
    args.num_groups = num_tiles(weight.rows);
    args.pairs = residual_pairs(step, weight);
    args.may_look_ahead = may_look_ahead;
    return launch_split(step, args, x, {&weight, nullptr, nullptr}, stream);
}

Status launch_batch_o(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    // The residual is there before the attention has ended, which started when q, k and v had waited: nobody
    // has written it since.
    return launch_residual(step, layer.o_proj, step.buffers.attn, true, stream);
}

Status launch_batch_down(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    return launch_residual(step, layer.down_proj, step.buffers.act, false, stream);
}
