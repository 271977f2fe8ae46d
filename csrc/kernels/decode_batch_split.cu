// decode_batch_split.cu -- the linear layers of a decode batch that have few rows: q, k and v with RoPE and
// the cache write, and O and down with the residual addition. Several thread blocks share out K.
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

constexpr int kStagesAhead = 2;  // of weights, asked for before the kernel before this one has ended

enum SplitOutput { kQkvOutput, kResidualOutput };

struct SplitArguments {
    CUtensorMap tokens;           // the rows of x
    CUtensorMap weights[3];       // q, k, v; or one
    int first_rows, second_rows;  // of the first two matrices, in groups of 64
    int num_groups;               // of all
    int k_tiles, num_chunks;
    int num_stages;
    int token_tiles;
    float4 *sums;        // of all tiles' chunks: decode_batch_exchange.cuh
    unsigned *arrivals;  // [tiles], zero between uses
    const BatchHeader *header;
    SplitOutput output;
    bf16 *out;  // q, or the residual
    int out_columns;
    KvLayer cache;  // from here for q, k and v alone
    const bf16 *rope_table;
};

// What a thread writes: eight columns of a token's 64 and those 32 columns on; and what it needs for them,
// asked for before the products: nobody waits for it after them.
struct Pair {
    bf16 *low, *high;     // null: nothing
    uint4 first, second;  // of the residual, or cosines and sines
};

static __device__ __forceinline__ Pair residual_pair(const SplitArguments &args, int group, int token,
                                                     int chunk) {
    bf16 *low = args.out + (size_t)token * args.out_columns + group * kGroupRows + chunk * kVector;
    bf16 *high = low + kGroupRows / 2;
    return {low, high, load_vector(low), load_vector(high)};
}

// Of a head: in q, or in the cache.
static __device__ __forceinline__ Pair head_pair(const SplitArguments &args, int group, int token,
                                                 int chunk) {
    constexpr int kHalf = kTileCols / 2;
    int position = args.header->lengths[token] - 1;
    const bf16 *row = args.rope_table + (size_t)position * kTileCols + chunk * kVector;
    Pair pair = {nullptr, nullptr, load_vector(row), load_vector(row + kHalf)};
    if (group < args.first_rows) {
        pair.low = args.out + (size_t)token * args.out_columns + group * kTileCols + chunk * kVector;
        pair.high = pair.low + kHalf;
        return pair;
    }
    int kv_head = (group - args.first_rows) % args.cache.num_kv_heads;
    int block_size = args.cache.block_size, index = position / block_size;
    int offset = position - index * block_size;
    int block = args.header->block_tables[(size_t)token * args.header->max_blocks_per_seq + index];
    bf16 *tile = args.cache.data + kv_tile_offset(block, kv_head, args.cache.num_kv_heads, block_size);
    if (group >= args.first_rows + args.second_rows) tile += (size_t)block_size * kTileCols;
    pair.low = tile + tile_offset(offset, chunk);
    pair.high = tile + tile_offset(offset, chunk + kHalf / kVector);
    return pair;
}

// The pair from what is staged of it.
static __device__ __forceinline__ void write_pair(const SplitArguments &args, int group, const Pair &pair,
                                                  const bf16 *staged) {
    uint4 low = load_vector(staged), high = load_vector(staged + kGroupRows / 2);
    float a[kVector], b[kVector], x[kVector], y[kVector];
    unpack(a, low), unpack(b, high);
    unpack(x, pair.first), unpack(y, pair.second);
    if (args.output == kResidualOutput) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) x[j] = __fadd_rn(x[j], a[j]), y[j] = __fadd_rn(y[j], b[j]);
        low = pack(x), high = pack(y);
    } else if (group < args.first_rows + args.second_rows) {  // a query or a key: rotated
        float rotated[2][kVector];
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            rotated[0][j] = __fsub_rn(bf16_product(a[j], x[j]), bf16_product(b[j], y[j]));
            rotated[1][j] = __fadd_rn(bf16_product(b[j], x[j]), bf16_product(a[j], y[j]));
        }
        low = pack(rotated[0]), high = pack(rotated[1]);
    }
    store_vector(pair.low, low);
    store_vector(pair.high, high);
}

// Of the three matrices, side by side, the one that holds a group.
static __device__ __forceinline__ GroupPlace group_place(const SplitArguments &args, int group) {
    int second = group - args.first_rows, third = second - args.second_rows;
    int matrix = third >= 0 ? 2 : second >= 0 ? 1 : 0;
    int own_group = third >= 0 ? third : second >= 0 ? second : group;
    return {&args.weights[matrix], own_group * kGroupStrips};
}

template <typename Shape>
static __device__ __forceinline__ void produce(const SplitArguments &args, const Ring &ring,
                                               const Exchange &exchange, int row_tile, int token_tile) {
    using Stage = typename Shape::Stage;
    uint64_t policy = evict_first_policy();
    int count = own_stages<Stage>(args.k_tiles, exchange.rank, Shape::kRanks);
    int ahead = min(count, min(kStagesAhead, ring.num_stages));
    auto place_of = [&](int g) { return group_place(args, row_tile * Shape::kGroups + g); };
    auto tiles_of = [&](int i) {
        return tiles_of_stage<Stage>(i, args.k_tiles, exchange.rank, Shape::kRanks);
    };
    for (int i = 0; i < ahead; ++i) copy_weights<Stage>(ring, i, tiles_of(i), policy, place_of);
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
        int num_seqs = args.header->num_seqs;
#pragma unroll
        for (int i = 0; i < kOwnPairs; ++i) {
            int index = i * kWarpgroup + member, token = first_token + own_token(index);
            pairs[i].low = nullptr;
            if (index >= kPairs || token >= num_seqs || group >= args.num_groups) continue;
            pairs[i] = args.output == kResidualOutput ? residual_pair(args, group, token, own_chunk(index))
                                                      : head_pair(args, group, token, own_chunk(index));
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
            write_pair(args, group, pairs[i],
                       staging + own_token(index) * kStagedColumns + own_chunk(index) * kVector);
        }
    }
};

template <typename Shape>
static __global__ void __launch_bounds__(Shape::kThreads, Shape::kResident)
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
        wait_for_previous_kernel();
        // Not before: the attention that follows reads the cache and the header without waiting.
        let_next_kernel_start();
        int group = thread / kWarpgroup;
        int first_token = token_tile * Shape::kTokens + exchange.rank * Shape::kFragments * 8;
        GroupWriter<Shape> writer(args, row_tile * Shape::kGroups + group, first_token,
                                  thread % kWarpgroup);
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
    args.num_stages = min(kMaxStages, (Shape::kSharedBytes - kAlignment - kStagedBytes) / Stage::kBytes);
    size_t bytes = kAlignment + (size_t)args.num_stages * Stage::kBytes + kStagedBytes;
    return launch_chained(batch_split_kernel<Shape>, dim3((unsigned)(tiles * Shape::kRanks)),
                          Shape::kThreads, bytes, 1, stream, args);
}

// The most blocks a tile for which every block has a place and a chunk; two where that cannot be. One, for
// many tokens, where tiles of 64 rows occupy more than half the multiprocessors.
template <int kTokens>
static Status launch_of(const BatchStep &step, const SplitArguments &args, const bf16 *x,
                        const Matrix *const (&weights)[3], cudaStream_t stream) {
    using Four = SplitShape<kTokens, 4>;
    int narrow_tiles = args.num_groups * args.token_tiles;
    int tiles = (args.num_groups + Four::kGroups - 1) / Four::kGroups * args.token_tiles;
    auto fits = [&](int ranks) {
        return tiles * ranks <= step.num_multiprocessors * Four::kResident && ranks <= args.num_chunks;
    };
    if constexpr (kTokens == kMostTokens) {
        if (2 * narrow_tiles > step.num_multiprocessors)
            return launch_shape<SplitShape<kTokens, 1>>(step, args, x, weights, narrow_tiles, stream);
        if (fits(8)) return launch_shape<SplitShape<kTokens, 8>>(step, args, x, weights, tiles, stream);
    }
    if (fits(4)) return launch_shape<Four>(step, args, x, weights, tiles, stream);
    return launch_shape<SplitShape<kTokens, 2>>(step, args, x, weights, tiles, stream);
}

static Status launch_split(const BatchStep &step, SplitArguments args, const bf16 *x,
                           const Matrix *const (&weights)[3], cudaStream_t stream) {
    args.header = step.buffers.header;
    args.k_tiles = num_tiles(weights[0]->cols);
    args.num_chunks = (args.k_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
    args.token_tiles = batch_token_tiles(step);
    args.sums = step.buffers.sums;
    args.arrivals = step.buffers.arrivals;
    if (step.tile_tokens == 32) return launch_of<32>(step, args, x, weights, stream);
    if (step.tile_tokens == 64) return launch_of<64>(step, args, x, weights, stream);
    return launch_of<kMostTokens>(step, args, x, weights, stream);
}

Status launch_batch_qkv(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    SplitArguments args = {};
    args.first_rows = step.problem.num_heads;
    args.second_rows = step.problem.num_kv_heads;
    args.num_groups = step.problem.num_heads + 2 * step.problem.num_kv_heads;
    args.output = kQkvOutput;
    args.out = step.buffers.q;
    args.out_columns = layer.q_proj.rows;
    args.cache = layer.cache;
    args.rope_table = step.problem.rope_table;
    return launch_split(step, args, step.buffers.normed, {&layer.q_proj, &layer.k_proj, &layer.v_proj},
                        stream);
}

static Status launch_residual(const BatchStep &step, const Matrix &weight, const bf16 *x,
                              cudaStream_t stream) {
    SplitArguments args = {};
    args.num_groups = num_tiles(weight.rows);
    args.first_rows = args.num_groups + 1;  // a tile's second group may lie beyond the last
    args.output = kResidualOutput;
    args.out = step.buffers.residual;
    args.out_columns = weight.rows;
    return launch_split(step, args, x, {&weight, nullptr, nullptr}, stream);
}

Status launch_batch_o(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    return launch_residual(step, layer.o_proj, step.buffers.attn, stream);
}

Status launch_batch_down(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    return launch_residual(step, layer.down_proj, step.buffers.act, stream);
}
