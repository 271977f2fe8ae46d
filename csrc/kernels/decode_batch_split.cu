// decode_batch_split.cu -- the linear layers of a decode batch that have few rows: q, k and v with RoPE and
// the cache write, and O and down with the residual addition. A cluster shares out K.
//
//   y[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// Shapes    x packed (decode_batch.cuh); q [num_seqs, num_heads, 64]; residual [num_seqs, hidden_size]
// Rounding  docs/numerics.md sections 2, 6 and 7: y to bf16 before RoPE and before the addition
// Mapping   a cluster of 2 to 8 thread blocks per 64 rows (128 where tokens are many) and token tile;
//           block r computes chunks r, r + ranks, .. and sends each chunk sum to the blocks that own its
//           tokens, which add them in order while the next chunk is multiplied. One thread fills a ring,
//           one or two warpgroups multiply
// Cost      2 bytes per weight: memory-bound up to some hundred tokens
// See       decode_batch_exchange.cuh, twin/linear.c, tests/kernels/test_bits_decode_batch.py

#include <limits.h>

#include "decode_batch_exchange.cuh"

constexpr int kSharedOfTwo = 112 * 1024;  // what a block may take where two share a multiprocessor
constexpr int kSharedOfOne = 226 * 1024;

enum SplitOutput { kQkvOutput, kResidualOutput };

struct SplitArguments {
    CUtensorMap weights[3];       // q, k, v; or one
    const bf16 *x;                // packed
    int first_rows, second_rows;  // of the first two matrices, in groups of 64
    int num_groups;               // of all
    int k_tiles;
    int num_stages;
    const BatchHeader *header;
    SplitOutput output;
    bf16 *out;  // q, or the residual
    int out_columns;
    KvLayer cache;  // from here for q, k and v alone
    const bf16 *rope_table;
};

__device__ __forceinline__ float bf16_sum(float a, float b) {
    return to_float(to_bf16(__fadd_rn(a, b)));
}

// Eight values of `out` from eight staged ones.
static __device__ __forceinline__ void add_to_residual(bf16 *residual, const bf16 *staged) {
    float x[kVector], y[kVector];
    unpack(x, load_vector(residual));
    unpack(y, load_vector(staged));
#pragma unroll
    for (int j = 0; j < kVector; ++j) x[j] = bf16_sum(x[j], y[j]);
    store_vector(residual, pack(x));
}

// Chunk `chunk` (of eight) of a head's row and the one 32 columns on, rotated where it is a query or a key,
// to q or into the cache.
static __device__ __forceinline__ void write_head(const SplitArguments &args, int group, int token,
                                                  int chunk, const bf16 *staged) {
    constexpr int kHalf = kTileCols / 2;
    bool is_query = group < args.first_rows;
    int kv_head = (group - args.first_rows) % args.cache.num_kv_heads;
    bool is_value = group >= args.first_rows + args.second_rows;
    int position = args.header->lengths[token] - 1;
    uint4 low = load_vector(staged + chunk * kVector), high = load_vector(staged + kHalf + chunk * kVector);
    if (!is_value) {
        const bf16 *row = args.rope_table + (size_t)position * kTileCols + chunk * kVector;
        float a[kVector], b[kVector], cosine[kVector], sine[kVector], rotated[kVector];
        unpack(a, low), unpack(b, high);
        unpack(cosine, load_vector(row)), unpack(sine, load_vector(row + kHalf));
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            rotated[j] = __fsub_rn(bf16_product(a[j], cosine[j]), bf16_product(b[j], sine[j]));
        low = pack(rotated);
#pragma unroll
        for (int j = 0; j < kVector; ++j)
            rotated[j] = __fadd_rn(bf16_product(b[j], cosine[j]), bf16_product(a[j], sine[j]));
        high = pack(rotated);
    }
    if (is_query) {
        bf16 *to = args.out + (size_t)token * args.out_columns + group * kTileCols + chunk * kVector;
        store_vector(to, low);
        store_vector(to + kHalf, high);
        return;
    }
    int block_size = args.cache.block_size, index = position / block_size;
    int block = args.header->block_tables[(size_t)token * args.header->max_blocks_per_seq + index];
    bf16 *tile = args.cache.data + kv_tile_offset(block, kv_head, args.cache.num_kv_heads, block_size) +
                 (is_value ? (size_t)block_size * kTileCols : 0);
    int offset = position - index * block_size;
    store_vector(tile + tile_offset(offset, chunk), low);
    store_vector(tile + tile_offset(offset, chunk + kHalf / kVector), high);
}

// Of the three matrices, side by side, the one that holds a group.
static __device__ __forceinline__ GroupPlace group_place(const SplitArguments &args, int group) {
    int second = group - args.first_rows, third = second - args.second_rows;
    int matrix = third >= 0 ? 2 : second >= 0 ? 1 : 0;
    int own_group = third >= 0 ? third : second >= 0 ? second : group;
    return {&args.weights[matrix], own_group * kGroupStrips};
}

template <typename Shape>
static __device__ __forceinline__ void produce(const SplitArguments &args, const Ring &ring, int rank) {
    using Stage = typename Shape::Stage;
    const bf16 *tokens = args.x + (size_t)blockIdx.y * args.k_tiles * Shape::kTokens * kTileCols;
    uint64_t policy = evict_first_policy();
    int count = own_stages<Stage>(args.k_tiles, rank, Shape::kRanks), ahead = min(count, ring.num_stages);
    auto place_of = [&](int g) { return group_place(args, (int)blockIdx.z * Shape::kGroups + g); };
    auto tiles_of = [&](int i) { return tiles_of_stage<Stage>(i, args.k_tiles, rank, Shape::kRanks); };
    for (int i = 0; i < ahead; ++i) copy_weights<Stage>(ring, i, tiles_of(i), policy, place_of);
    wait_for_previous_kernel();
    for (int i = 0; i < ahead; ++i) copy_tokens<Stage>(ring, i, tokens, tiles_of(i));
    RingPlace place;
    for (int i = ahead; i < count; ++i, place.advance(ring)) {
        barrier_wait(shared_address(&ring.empty[place.stage]), place.parity);
        copy_weights<Stage>(ring, place.stage, tiles_of(i), policy, place_of);
        copy_tokens<Stage>(ring, place.stage, tokens, tiles_of(i));
    }
}

// What becomes of a group's sums: 64 rows of this block's tokens.
template <typename Shape>
static __device__ __forceinline__ void write_group(const float (&sums)[Shape::kFragments][4],
                                                   const SplitArguments &args, bf16 *staging, int rank,
                                                   int group, int member, int num_seqs) {
    auto synchronise = [&] {
        if (group == 0) {
            named_barrier_sync<1, kWarpgroup>();
        } else {
            named_barrier_sync<2, kWarpgroup>();
        }
    };
    synchronise();  // the buffer, where they are staged, is read
#pragma unroll
    for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
        for (int e = 0; e < 4; ++e)
            staging[held_token(member, f, e) * kStagedColumns + held_row(member, e)] = to_bf16(sums[f][e]);
    }
    synchronise();  // the staged rows visible to every thread
    int row_group = (int)blockIdx.z * Shape::kGroups + group;
    int first_token = (int)blockIdx.y * Shape::kTokens + rank * Shape::kFragments * 8;
    int own_tokens = Shape::own_fragments(rank) * 8;
    int per_token = args.output == kQkvOutput ? kChunksPerRow / 2 : kChunksPerRow;
    if (row_group >= args.num_groups) return;
    for (int i = member; i < own_tokens * per_token; i += kWarpgroup) {
        int own = i / per_token, chunk = i % per_token, token = first_token + own;
        const bf16 *staged = staging + own * kStagedColumns;
        if (token >= num_seqs) break;
        if (args.output == kQkvOutput) {
            write_head(args, row_group, token, chunk, staged);
        } else {
            add_to_residual(
                args.out + (size_t)token * args.out_columns + row_group * kGroupRows + chunk * kVector,
                staged + chunk * kVector);
        }
    }
}

template <typename Shape>
static __global__ void __launch_bounds__(Shape::kThreads)
    batch_split_kernel(const __grid_constant__ SplitArguments args) {
    extern __shared__ unsigned char raw[];
    __shared__ uint64_t full[kMaxStages], empty[kMaxStages];
    __shared__ uint64_t received[Shape::kGroups], folded[Shape::kGroups];
    int thread = (int)threadIdx.x, rank = (int)blockIdx.x;
    uint32_t start = shared_address(raw), base = (start + kAlignment - 1) / kAlignment * kAlignment;
    uint32_t buffers = base + args.num_stages * Shape::Stage::kBytes;
    Ring ring = {base, full, empty, args.num_stages};
    if (thread < Shape::kGroups) {
        barrier_init(shared_address(&received[thread]), 1);
        barrier_init(shared_address(&folded[thread]), Shape::kRanks * kWarpgroup / kWarp);
        barrier_init_fence();
    }
    init_ring(ring, Shape::kConsumers / kWarp);
    __syncthreads();  // this block's barriers are there
    cluster_arrive();
    if (thread >= Shape::kConsumers) {
        if (thread == Shape::kConsumers) produce<Shape>(args, ring, rank);
        __syncwarp();
        cluster_wait();
    } else {
        wait_for_previous_kernel();
        // Not before: the attention that follows reads the cache and the header without waiting.
        let_next_kernel_start();
        int num_seqs = args.header->num_seqs, group = thread / kWarpgroup, member = thread % kWarpgroup;
        uint32_t buffer = buffers + group * Shape::kGroupBytes;
        Exchange exchange = {buffer, shared_address(&received[group]), shared_address(&folded[group])};
        float sums[Shape::kFragments][4];
        consume<Shape>(sums, args.k_tiles, ring, exchange, rank, group, member);
        // A block may leave now: it has received what the others send, and their word of every round but
        // the last, of which there is none.
        write_group<Shape>(sums, args, reinterpret_cast<bf16 *>(raw + (buffer - start)), rank, group,
                           member, num_seqs);
    }
}

template <typename Shape>
static int num_stages_of(int k_tiles) {
    using Stage = typename Shape::Stage;
    int num_chunks = (k_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
    int own = (num_chunks + Shape::kRanks - 1) / Shape::kRanks * Stage::kStagesPerChunk;
    int room = (Shape::kGroups == 2 ? kSharedOfOne : kSharedOfTwo) - kAlignment - Shape::kBufferBytes;
    return min(min(kMaxStages, own), room / Stage::kBytes);
}
template <typename Shape>
static size_t shared_bytes_of(int k_tiles) {
    return kAlignment + (size_t)num_stages_of<Shape>(k_tiles) * Shape::Stage::kBytes + Shape::kBufferBytes;
}

template <typename Shape>
static Status launch_shape(SplitArguments args, const Matrix *const (&weights)[3], int token_tiles,
                           cudaStream_t stream) {
    for (int i = 0; i < 3; ++i) {
        if (weights[i] != nullptr)
            TRY(encode_group_map<typename Shape::Stage>(&args.weights[i], *weights[i]));
    }
    args.num_stages = num_stages_of<Shape>(args.k_tiles);
    unsigned tiles = (unsigned)((args.num_groups + Shape::kGroups - 1) / Shape::kGroups);
    return launch_chained(batch_split_kernel<Shape>, dim3(Shape::kRanks, (unsigned)token_tiles, tiles),
                          Shape::kThreads, shared_bytes_of<Shape>(args.k_tiles), Shape::kRanks, stream,
                          args);
}

// About how long a layer of many tokens takes with so many ranks: the clusters that do not fit at once
// wait, and each has its chunks to multiply after what it costs to start and to end.
template <int kRanks>
static Status estimate(int *cost, int k_tiles, int tiles) {
    using Shape = SplitShape<kMostTokens, kRanks>;
    constexpr int kStart = 5, kChunk = 3;  // microseconds
    int num_chunks = (k_tiles + kTilesPerChunk - 1) / kTilesPerChunk, resident;
    TRY(count_resident_clusters(&resident, batch_split_kernel<Shape>, Shape::kThreads,
                                shared_bytes_of<Shape>(k_tiles), kRanks));
    int rounds = (num_chunks + kRanks - 1) / kRanks, waves = (tiles + resident - 1) / max(resident, 1);
    *cost = resident < 1 ? INT_MAX : waves * (kStart + rounds * kChunk);
    return STATUS_OK;
}

static Status launch_many_tokens(const BatchStep &step, const SplitArguments &args,
                                 const Matrix *const (&weights)[3], cudaStream_t stream) {
    int token_tiles = batch_token_tiles(step), tiles = (args.num_groups + 1) / 2 * token_tiles;
    int costs[5], best = 0;
    TRY(estimate<2>(&costs[0], args.k_tiles, tiles));
    TRY(estimate<3>(&costs[1], args.k_tiles, tiles));
    TRY(estimate<4>(&costs[2], args.k_tiles, tiles));
    TRY(estimate<6>(&costs[3], args.k_tiles, tiles));
    TRY(estimate<8>(&costs[4], args.k_tiles, tiles));
    for (int i = 1; i < 5; ++i)
        if (costs[i] < costs[best]) best = i;
    if (best == 0) return launch_shape<SplitShape<kMostTokens, 2>>(args, weights, token_tiles, stream);
    if (best == 1) return launch_shape<SplitShape<kMostTokens, 3>>(args, weights, token_tiles, stream);
    if (best == 2) return launch_shape<SplitShape<kMostTokens, 4>>(args, weights, token_tiles, stream);
    if (best == 3) return launch_shape<SplitShape<kMostTokens, 6>>(args, weights, token_tiles, stream);
    return launch_shape<SplitShape<kMostTokens, 8>>(args, weights, token_tiles, stream);
}

static Status launch_split(const BatchStep &step, const SplitArguments &args,
                           const Matrix *const (&weights)[3], cudaStream_t stream) {
    int token_tiles = batch_token_tiles(step);
    if (step.tile_tokens == 32) return launch_shape<SplitShape<32, 4>>(args, weights, token_tiles, stream);
    if (step.tile_tokens == 64) return launch_shape<SplitShape<64, 4>>(args, weights, token_tiles, stream);
    return launch_many_tokens(step, args, weights, stream);
}

Status launch_batch_qkv(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    SplitArguments args = {};
    args.x = step.buffers.normed;
    args.first_rows = step.problem.num_heads;
    args.second_rows = step.problem.num_kv_heads;
    args.num_groups = step.problem.num_heads + 2 * step.problem.num_kv_heads;
    args.k_tiles = num_tiles(layer.q_proj.cols);
    args.header = step.buffers.header;
    args.output = kQkvOutput;
    args.out = step.buffers.q;
    args.out_columns = layer.q_proj.rows;
    args.cache = layer.cache;
    args.rope_table = step.problem.rope_table;
    return launch_split(step, args, {&layer.q_proj, &layer.k_proj, &layer.v_proj}, stream);
}

static Status launch_residual(const BatchStep &step, const Matrix &weight, const bf16 *x,
                              cudaStream_t stream) {
    SplitArguments args = {};
    args.x = x;
    args.num_groups = num_tiles(weight.rows);
    args.first_rows = args.num_groups + 1;  // a tile's second group may lie beyond the last
    args.k_tiles = num_tiles(weight.cols);
    args.header = step.buffers.header;
    args.output = kResidualOutput;
    args.out = step.buffers.residual;
    args.out_columns = weight.rows;
    return launch_split(step, args, {&weight, nullptr, nullptr}, stream);
}

Status launch_batch_o(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    return launch_residual(step, layer.o_proj, step.buffers.attn, stream);
}

Status launch_batch_down(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    return launch_residual(step, layer.down_proj, step.buffers.act, stream);
}
