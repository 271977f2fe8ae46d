// decode_batch_split.cu -- the linear layers of a decode batch that have few rows: q, k and v with RoPE and
// the cache write, and O and down with the residual addition. A cluster shares out K.
//
//   y[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// Shapes    x packed (decode_batch.cuh); q [num_seqs, num_heads, 64]; residual [num_seqs, hidden_size]
// Rounding  docs/numerics.md sections 2, 6 and 7: y to bf16 before RoPE and before the addition
// Mapping   four thread blocks per 64 rows and token tile; block r computes chunks r, r + 4, .. and sends
//           each chunk sum to the blocks that own its tokens, which add them in order. One warp fills a
//           ring, a warpgroup multiplies
// Cost      2 bytes per weight: memory-bound up to some hundred tokens
// See       decode_batch_linear.cuh, twin/linear.c, tests/kernels/test_bits_decode_batch.py

#include "decode_batch_linear.cuh"

constexpr int kRanks = 4;
constexpr int kThreads = kWarpgroup + kWarp;  // the consumers, then the producer's warp
constexpr int kStagedColumns = kGroupRows + kVector;
constexpr int kSharedOfTwo = 112 * 1024;  // what a block may take where two share a multiprocessor
constexpr int kSharedOfOne = 220 * 1024;

enum SplitOutput { kQkvOutput, kResidualOutput };

struct SplitArguments {
    const bf16 *x;                // packed
    const bf16 *weights[3];       // q, k, v; or one
    int first_rows, second_rows;  // of the first two matrices, in groups of 64
    int k_tiles;
    int num_stages, num_buffers;
    const BatchHeader *header;
    SplitOutput output;
    bf16 *out;  // q, or the residual
    int out_columns;
    KvLayer cache;  // from here for q, k and v alone
    const bf16 *rope_table;
};

// A round's chunk sums in the owner's memory: [kRanks][fragments][kWarpgroup] float4.
template <int kTokens>
struct SplitShape {
    using Stage = StageShape<kTokens, 1, kTokens == 32 ? 4 : 2>;
    static constexpr int kFragments = kTokens / 8 / kRanks;  // of eight tokens, that a block owns
    static constexpr int kOwnTokens = kFragments * 8;
    static constexpr int kRankBytes = kFragments * kWarpgroup * 16;
    static constexpr int kBufferBytes = kRanks * kRankBytes;
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

template <int kTokens>
static __device__ __forceinline__ void produce(const SplitArguments &args, const Ring &ring, int rank) {
    const bf16 *tokens = args.x + (size_t)blockIdx.y * args.k_tiles * kTokens * kTileCols;
    int row_group = (int)blockIdx.z, second = row_group - args.first_rows,
        third = second - args.second_rows;
    const bf16 *matrix = third >= 0 ? args.weights[2] : second >= 0 ? args.weights[1] : args.weights[0];
    int matrix_group = third >= 0 ? third : second >= 0 ? second : row_group;
    const bf16 *group = matrix + (size_t)matrix_group * kGroupStrips * args.k_tiles * kStripValues;
    uint64_t policy = evict_first_policy();
    using Stage = typename SplitShape<kTokens>::Stage;
    int count = own_stages<Stage>(args.k_tiles, rank, kRanks), ahead = min(count, ring.num_stages);
    auto group_data = [&](int) { return group; };
    auto tiles_of = [&](int i) { return tiles_of_stage<Stage>(i, args.k_tiles, rank, kRanks); };
    for (int i = 0; i < ahead; ++i)
        copy_weights<Stage>(ring, i, args.k_tiles, tiles_of(i), policy, group_data);
    wait_for_previous_kernel();
    for (int i = 0; i < ahead; ++i) copy_tokens<Stage>(ring, i, tokens, tiles_of(i));
    RingPlace place;
    for (int i = ahead; i < count; ++i, place.advance(ring)) {
        barrier_wait(shared_address(&ring.empty[place.stage]), place.parity);
        copy_weights<Stage>(ring, place.stage, args.k_tiles, tiles_of(i), policy, group_data);
        copy_tokens<Stage>(ring, place.stage, tokens, tiles_of(i));
    }
}

// This block's tokens' sums, 64 rows, in the order of the chunks.
template <int kTokens>
static __device__ __forceinline__ void consume(float (&sums)[SplitShape<kTokens>::kFragments][4],
                                               const SplitArguments &args, const Ring &ring,
                                               uint32_t buffers, uint64_t *received, int rank) {
    using Shape = SplitShape<kTokens>;
    int thread = (int)threadIdx.x;
    int num_chunks = (args.k_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
    RingPlace place;
    for (int first = 0; first < num_chunks; first += kRanks) {
        int round = first / kRanks, buffer = round % args.num_buffers, chunk = first + rank;
        uint32_t at = buffers + buffer * Shape::kBufferBytes, barrier = shared_address(&received[buffer]);
        float acc[kTokens / 2];
        if (chunk < num_chunks)
            multiply_chunk<typename Shape::Stage>(
                acc, ring, place, 0, min(kTilesPerChunk, args.k_tiles - chunk * kTilesPerChunk),
                thread == 0);
        __syncwarp();
        if (first == 0) cluster_wait();  // the other blocks have their barriers
        if (chunk < num_chunks) {
#pragma unroll
            for (int f = 0; f < kTokens / 8; ++f) {
                int owner = f / Shape::kFragments, place_of_owner = f % Shape::kFragments;
                uint32_t to = at + rank * Shape::kRankBytes + (place_of_owner * kWarpgroup + thread) * 16;
                store_async_16(map_shared(to, owner), &acc[4 * f], map_shared(barrier, owner));
            }
        }
        int num_senders = min(kRanks, num_chunks - first);
        if (thread == 0) barrier_arrive_expect(barrier, num_senders * Shape::kRankBytes);
        barrier_wait(barrier, round / args.num_buffers % 2);
        for (int sender = 0; sender < num_senders; ++sender) {
#pragma unroll
            for (int f = 0; f < Shape::kFragments; ++f) {
                uint32_t from = at + sender * Shape::kRankBytes + (f * kWarpgroup + thread) * 16;
                float4 v = load_shared_16(from);
                const float values[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
                for (int e = 0; e < 4; ++e)
                    sums[f][e] = first + sender == 0 ? values[e] : __fadd_rn(sums[f][e], values[e]);
            }
        }
    }
}

template <int kTokens>
static __global__ void __launch_bounds__(kThreads)
    batch_split_kernel(const __grid_constant__ SplitArguments args) {
    using Shape = SplitShape<kTokens>;
    extern __shared__ unsigned char raw[];
    __shared__ uint64_t full[kMaxStages], empty[kMaxStages], received[2];
    __shared__ alignas(16) bf16 staged[Shape::kOwnTokens][kStagedColumns];
    int thread = (int)threadIdx.x, rank = (int)blockIdx.x;
    uint32_t base = (shared_address(raw) + kAlignment - 1) / kAlignment * kAlignment;
    Ring ring = {base, full, empty, args.num_stages};
    if (thread == 0) {
        barrier_init(shared_address(&received[0]), 1);
        barrier_init(shared_address(&received[1]), 1);
    }
    init_ring(ring, 1);
    __syncthreads();  // this block's barriers are there
    cluster_arrive();
    if (thread >= kWarpgroup) {
        produce<kTokens>(args, ring, rank);
        __syncwarp();
        cluster_wait();
    } else {
        wait_for_previous_kernel();
        // Not before: the attention that follows reads the cache and the header without waiting.
        let_next_kernel_start();
        int num_seqs = args.header->num_seqs;
        float sums[Shape::kFragments][4];
        consume<kTokens>(sums, args, ring, base + args.num_stages * Shape::Stage::kBytes, received, rank);
#pragma unroll
        for (int f = 0; f < Shape::kFragments; ++f) {
#pragma unroll
            for (int e = 0; e < 4; ++e)
                staged[held_token(thread, f, e)][held_row(thread, e)] = to_bf16(sums[f][e]);
        }
        named_barrier_sync<1, kWarpgroup>();  // the staged rows visible to every thread
        int group = (int)blockIdx.z, first_token = (int)blockIdx.y * kTokens + rank * Shape::kOwnTokens;
        int per_token = args.output == kQkvOutput ? kChunksPerRow / 2 : kChunksPerRow;
        for (int i = thread; i < Shape::kOwnTokens * per_token; i += kWarpgroup) {
            int own = i / per_token, chunk = i % per_token, token = first_token + own;
            if (token >= num_seqs) break;
            if (args.output == kQkvOutput) {
                write_head(args, group, token, chunk, staged[own]);
            } else {
                add_to_residual(
                    args.out + (size_t)token * args.out_columns + group * kGroupRows + chunk * kVector,
                    staged[own] + chunk * kVector);
            }
        }
        __syncwarp();
    }
    cluster_arrive();  // no block leaves while another's chunk sums are on their way
    cluster_wait();
}

template <int kTokens>
static Status launch_split_of(SplitArguments args, int groups, int token_tiles, cudaStream_t stream) {
    using Shape = SplitShape<kTokens>;
    int num_chunks = (args.k_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
    args.num_buffers = num_chunks > kRanks ? 2 : 1;
    int own = (num_chunks + kRanks - 1) / kRanks * Shape::Stage::kStagesPerChunk;
    // Many tokens, or long rows, which are few: one block to a multiprocessor.
    bool is_alone = kTokens == kMostTokens || args.num_buffers == 2;
    int room =
        (is_alone ? kSharedOfOne : kSharedOfTwo) - kAlignment - args.num_buffers * Shape::kBufferBytes;
    args.num_stages = min(min(kMaxStages, own), room / Shape::Stage::kBytes);
    size_t bytes = kAlignment + args.num_stages * Shape::Stage::kBytes +
                   (size_t)args.num_buffers * Shape::kBufferBytes;
    return launch_chained(batch_split_kernel<kTokens>,
                          dim3(kRanks, (unsigned)token_tiles, (unsigned)groups), kThreads, bytes, kRanks,
                          stream, args);
}

static Status launch_split(const BatchStep &step, const SplitArguments &args, int groups,
                           cudaStream_t stream) {
    int tiles = batch_token_tiles(step);
    if (step.tile_tokens == 32) return launch_split_of<32>(args, groups, tiles, stream);
    if (step.tile_tokens == 64) return launch_split_of<64>(args, groups, tiles, stream);
    return launch_split_of<kMostTokens>(args, groups, tiles, stream);
}

Status launch_batch_qkv(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    SplitArguments args = {};
    args.x = step.buffers.normed;
    args.weights[0] = static_cast<const bf16 *>(layer.q_proj.data);
    args.weights[1] = static_cast<const bf16 *>(layer.k_proj.data);
    args.weights[2] = static_cast<const bf16 *>(layer.v_proj.data);
    args.first_rows = step.problem.num_heads;
    args.second_rows = step.problem.num_kv_heads;
    args.k_tiles = num_tiles(layer.q_proj.cols);
    args.header = step.buffers.header;
    args.output = kQkvOutput;
    args.out = step.buffers.q;
    args.out_columns = layer.q_proj.rows;
    args.cache = layer.cache;
    args.rope_table = step.problem.rope_table;
    return launch_split(step, args, step.problem.num_heads + 2 * step.problem.num_kv_heads, stream);
}

static Status launch_residual(const BatchStep &step, const Matrix &weight, const bf16 *x,
                              cudaStream_t stream) {
    SplitArguments args = {};
    args.x = x;
    args.weights[0] = static_cast<const bf16 *>(weight.data);
    args.first_rows = num_tiles(weight.rows);
    args.second_rows = 1;
    args.k_tiles = num_tiles(weight.cols);
    args.header = step.buffers.header;
    args.output = kResidualOutput;
    args.out = step.buffers.residual;
    args.out_columns = weight.rows;
    return launch_split(step, args, num_tiles(weight.rows), stream);
}

Status launch_batch_o(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    return launch_residual(step, layer.o_proj, step.buffers.attn, stream);
}

Status launch_batch_down(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    return launch_residual(step, layer.down_proj, step.buffers.act, stream);
}
