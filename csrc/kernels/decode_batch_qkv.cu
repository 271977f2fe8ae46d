// decode_batch_qkv.cu -- q, k and v of up to 64 sequences, with RoPE and the cache write. No two thread blocks
// share a row.
//
//   y[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// Shapes    x [num_seqs, hidden_size]; q [num_seqs, num_heads, 64]
// Rounding  docs/numerics.md sections 2 and 6: y to bf16 before RoPE
// Mapping   a thread block per 32 weight rows, 16 and those half a head on, as columns of wgmma; the tokens
//           are its rows. Warpgroup c % 4 multiplies chunk c and adds it to the sum that the one before it
//           hands over; one thread fills a ring
// Cost      2 bytes per weight: memory-bound; each block reads all tokens, which the L2 cache has
// See       decode_batch_split.cu for more sequences, twin/linear.c, tests/kernels/test_bits_decode_batch.py

#include "decode_batch_linear.cuh"
#include "decode_batch_pair.cuh"

constexpr int kGroups = 4;  // warpgroups that multiply
constexpr int kConsumers = kGroups * kWarpgroup;
constexpr int kThreads = kConsumers + kWarp;  // the producer's warp is the last
constexpr int kRows = 32;                     // of a block
constexpr int kFragments = kRows / 8;
constexpr int kBoxStrips = kRows / 2 / kStripRows;  // that one copy brings: half a block's rows
constexpr int kHalfChunks = kChunksPerRow / 2;      // of a head's half
constexpr int kStageTiles = 2;
constexpr int kStripRun = kStageTiles * kStripBytes;
constexpr int kWeightBytes = 2 * kBoxStrips * kStripRun;
constexpr int kStagedColumns = kRows + kVector;  // padded
constexpr int kSumBytes = kFragments * kWarpgroup * (int)sizeof(float4);
constexpr int kMostStages = 16;
constexpr int kSharedBytes = 226 * 1024;

template <int kTokens_>
struct QkvShape {
    static constexpr int kTokens = kTokens_;
    static constexpr int kTokenTileBytes = kTokens * kTileCols * (int)sizeof(bf16);
    static constexpr int kBytes = kWeightBytes + kStageTiles * kTokenTileBytes;  // of a stage
    static constexpr int kStagedBytes = kTokens * kStagedColumns * (int)sizeof(bf16);
    static constexpr int kStages = (kSharedBytes - kAlignment - kSumBytes - kStagedBytes) / kBytes;
    static constexpr int kTotalBytes = kAlignment + kStages * kBytes + kSumBytes + kStagedBytes;
    static_assert(kStages <= kMostStages, "a barrier each");
    // wgmma reads 64 tokens' rows: those that do not exist lie in what follows the last stage's tokens.
    static_assert(kSumBytes + kStagedBytes >= (kGroupRows - kTokens) * kTileCols * (int)sizeof(bf16),
                  "within the shared memory");
};

struct QkvArguments {
    CUtensorMap tokens;      // the rows of x
    CUtensorMap weights[3];  // q, k, v
    int k_tiles, num_chunks;
    bool may_look_ahead;  // what a pair needs is there before the kernel before this one has ended
    PairArguments pairs;
};

// The ring's stages one after another, as everybody walks them.
template <typename Shape>
struct StageWalk {
    const Ring &ring;
    RingPlace place;

    __device__ __forceinline__ uint32_t at() const { return ring.base + place.stage * Shape::kBytes; }
    __device__ __forceinline__ uint32_t full() const { return shared_address(&ring.full[place.stage]); }
    __device__ __forceinline__ void await_data() const { barrier_wait(full(), place.parity); }
    __device__ __forceinline__ void await_room() const {
        barrier_wait(shared_address(&ring.empty[place.stage]), place.parity ^ 1);
    }
    __device__ __forceinline__ void advance() { place.advance(ring); }
};

// Weights into a stage, by one thread; the stage's tokens are expected too.
template <typename Shape>
static __device__ __forceinline__ void copy_weights(const QkvArguments &args, const StageWalk<Shape> &walk,
                                                    int first_tile, uint64_t policy) {
    int count = min(kStageTiles, args.k_tiles - first_tile), unit = (int)blockIdx.x * kBoxStrips;
    HeadPlace place = args.pairs.head_place(unit / kHalfChunks);
    int strip = place.head * kChunksPerRow + unit % kHalfChunks;
    barrier_arrive_expect(walk.full(), kWeightBytes + count * Shape::kTokenTileBytes);
#pragma unroll
    for (int half = 0; half < 2; ++half)
        copy_box_3d_with_policy(walk.at() + half * (kWeightBytes / 2), &args.weights[place.matrix], 0,
                                first_tile, strip + half * kHalfChunks, walk.full(), policy);
}

template <typename Shape>
static __device__ __forceinline__ void copy_tokens(const QkvArguments &args, const StageWalk<Shape> &walk,
                                                   int first_tile) {
#pragma unroll
    for (int i = 0; i < kStageTiles; ++i) {
        if (first_tile + i >= args.k_tiles) break;
        copy_box_2d(walk.at() + kWeightBytes + i * Shape::kTokenTileBytes, &args.tokens,
                    (first_tile + i) * kTileCols, 0, walk.full());
    }
}

template <typename Shape>
static __device__ __forceinline__ void produce(const QkvArguments &args, const Ring &ring) {
    uint64_t policy = evict_first_policy();
    int ahead = min(args.k_tiles, Shape::kStages * kStageTiles);
    StageWalk<Shape> weights = {ring}, tokens = {ring};
    for (int tile = 0; tile < ahead; tile += kStageTiles, weights.advance())
        copy_weights(args, weights, tile, policy);
    prefetch_map(&args.tokens);
    wait_for_previous_kernel();
    for (int tile = 0; tile < ahead; tile += kStageTiles, tokens.advance()) copy_tokens(args, tokens, tile);
    for (int tile = ahead; tile < args.k_tiles; tile += kStageTiles, tokens.advance()) {
        tokens.await_room();
        copy_weights(args, tokens, tile, policy);
        copy_tokens(args, tokens, tile);
    }
}

// One chunk of `tiles` k tiles: acc becomes its chain, 64 tokens x kRows.
template <typename Shape>
static __device__ __forceinline__ void multiply_chunk(float (&acc)[kRows / 2], StageWalk<Shape> &walk,
                                                      int tiles) {
    int previous = 0;
    for (int i = 0; i < tiles; ++i) {
        int tile = i % kStageTiles;
        if (tile == 0) walk.await_data();
        uint64_t tokens = matrix_descriptor(walk.at() + kWeightBytes + tile * Shape::kTokenTileBytes);
        uint64_t weights = matrix_descriptor(walk.at() + tile * kStripBytes, kStripRun);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kTileCols / NUMERICS_STEP; ++step) {
            uint64_t offset = (uint64_t)(step * NUMERICS_STEP * (int)sizeof(bf16) >> 4);
            wgmma_k16(acc, tokens + offset, weights + offset, i + step > 0);
        }
        wgmma_commit();
        wgmma_wait<1>();  // the previous tile is read: with it, perhaps, its stage
        if (tile == 0 && i > 0) release_stage(walk.ring, previous);
        if (tile == kStageTiles - 1 || i == tiles - 1) {
            previous = walk.place.stage;
            walk.advance();
        }
    }
    wgmma_wait<0>();
    release_stage(walk.ring, previous);
}

// A running sum goes from warpgroup to warpgroup, in the order of the chunks: thread i of one adds to what
// thread i of the one before has left.
struct SumRelay {
    uint64_t *turns;  // [kGroups]
    float4 *sums;     // [kFragments, kWarpgroup]
    int group, member, parity;

    __device__ __forceinline__ void receive(float (&acc)[kRows / 2]) {
        barrier_wait(shared_address(&turns[group]), parity);
        parity ^= 1;
#pragma unroll
        for (int f = 0; f < kFragments; ++f) {
            float4 v = sums[f * kWarpgroup + member];
            const float before[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int e = 0; e < 4; ++e) acc[4 * f + e] = __fadd_rn(before[e], acc[4 * f + e]);
        }
    }
    __device__ __forceinline__ void send(const float (&acc)[kRows / 2]) const {
#pragma unroll
        for (int f = 0; f < kFragments; ++f)
            sums[f * kWarpgroup + member] =
                make_float4(acc[4 * f], acc[4 * f + 1], acc[4 * f + 2], acc[4 * f + 3]);
        barrier_arrive(shared_address(&turns[(group + 1) % kGroups]));
    }
};

// What the threads of the last chunk's warpgroup write: unit i / kTokens of the block's, of token i % kTokens.
template <typename Shape>
struct PairWriter {
    const PairArguments &args;
    int member, unit, token, head;
    Pair pair;

    __device__ __forceinline__ PairWriter(const PairArguments &arguments, int thread)
        : args(arguments), member(thread), unit(thread / Shape::kTokens), token(thread % Shape::kTokens) {
        int place = (int)blockIdx.x * kBoxStrips + unit;
        head = place / kHalfChunks;
        pair.low = nullptr;
        if (unit < kBoxStrips && token < args.header->num_seqs)
            pair = head_pair(args, token, head, place % kHalfChunks);
    }
    // Lane (g, q) of warp w holds tokens 16 w + g and + 8, rows 8 f + 2 q and + 1.
    __device__ __forceinline__ void write(const float (&acc)[kRows / 2], bf16 *staged) const {
        int lane = member % kWarp, first_token = member / kWarp * 16 + lane / 4;
        if (first_token < Shape::kTokens) {
#pragma unroll
            for (int f = 0; f < kFragments; ++f) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    bf16 *to = staged + (first_token + 8 * h) * kStagedColumns + 8 * f + lane % 4 * 2;
                    *reinterpret_cast<uint32_t *>(to) =
                        pack_bf16(acc[4 * f + 2 * h], acc[4 * f + 2 * h + 1]);
                }
            }
        }
        named_barrier_sync<1, kWarpgroup>();  // the staged values visible to the threads that write them
        if (pair.low == nullptr) return;
        const bf16 *from = staged + token * kStagedColumns + unit * kStripRows;
        write_pair(args, head, pair, load_vector(from), load_vector(from + kRows / 2));
    }
};

template <typename Shape>
static __device__ __forceinline__ void consume(const QkvArguments &args, const Ring &ring, SumRelay relay,
                                               bf16 *staged) {
    bool is_last = (args.num_chunks - 1) % kGroups == relay.group;
    if (is_last && !args.may_look_ahead) wait_for_previous_kernel();
    PairWriter<Shape> writer(args.pairs, is_last ? relay.member : kConsumers);
    if (is_last) {
        wait_for_previous_kernel();
        // Not before: the attention that follows reads the header and the cache without waiting.
        let_next_kernel_start();
    }
    StageWalk<Shape> walk = {ring};
    float acc[kRows / 2];
    for (int chunk = 0; chunk < args.num_chunks; ++chunk) {
        int tiles = min(kTilesPerChunk, args.k_tiles - chunk * kTilesPerChunk);
        if (chunk % kGroups != relay.group) {
            // Seen all the same: who missed a turn of the ring would take a phase for the next but one.
            for (int i = 0; i < tiles; i += kStageTiles, walk.advance()) {
                walk.await_data();
                release_stage(ring, walk.place.stage);
            }
            continue;
        }
        multiply_chunk(acc, walk, tiles);
        if (chunk > 0) relay.receive(acc);
        if (chunk + 1 < args.num_chunks) relay.send(acc);
    }
    if (is_last) writer.write(acc, staged);
}

template <typename Shape>
static __global__ void __launch_bounds__(kThreads, 1)
    batch_qkv_kernel(const __grid_constant__ QkvArguments args) {
    extern __shared__ unsigned char raw[];
    __shared__ uint64_t full[kMostStages], empty[kMostStages], turns[kGroups];
    int thread = (int)threadIdx.x;
    uint32_t start = shared_address(raw), base = (start + kAlignment - 1) / kAlignment * kAlignment;
    Ring ring = {base, full, empty, Shape::kStages};
    init_ring(ring, kConsumers / kWarp);
    if (thread < kGroups) barrier_init(shared_address(&turns[thread]), kWarpgroup);
    __syncthreads();  // the barriers are there
    unsigned char *sums = raw + (base - start) + Shape::kStages * Shape::kBytes;
    if (thread >= kConsumers) {
        if (thread == kConsumers) produce<Shape>(args, ring);
    } else {
        int group = __shfl_sync(kFullWarp, thread / kWarpgroup, 0);  // the compiler sees: a warp's
        SumRelay relay = {turns, reinterpret_cast<float4 *>(sums), group, thread % kWarpgroup, 0};
        consume<Shape>(args, ring, relay, reinterpret_cast<bf16 *>(sums + kSumBytes));
    }
}

template <int kTokens>
static Status launch_shape(const BatchStep &step, QkvArguments args, const Matrix *const (&weights)[3],
                           cudaStream_t stream) {
    using Shape = QkvShape<kTokens>;
    int cols = weights[0]->cols, num_rows = 0;
    args.k_tiles = num_tiles(cols);
    args.num_chunks = (args.k_tiles + kTilesPerChunk - 1) / kTilesPerChunk;
    TRY(encode_rows_map(&args.tokens, step.buffers.normed, step.bucket, cols, kTokens));
    for (int i = 0; i < 3; ++i) {
        TRY(encode_strips_map(&args.weights[i], static_cast<const bf16 *>(weights[i]->data),
                              weights[i]->rows, cols, kBoxStrips, kStageTiles));
        num_rows += weights[i]->rows;
    }
    return launch_chained(batch_qkv_kernel<Shape>, dim3((unsigned)(num_rows / kRows)), kThreads,
                          Shape::kTotalBytes, 1, stream, args);
}

Status launch_batch_qkv(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    if (step.bucket > kGroupRows) return launch_batch_qkv_many(step, layer, stream);
    QkvArguments args = {};
    args.pairs = qkv_pairs(step, layer);
    args.may_look_ahead = may_qkv_look_ahead(step, layer);
    const Matrix *weights[3] = {&layer.q_proj, &layer.k_proj, &layer.v_proj};
    if (step.bucket == 32) return launch_shape<32>(step, args, weights, stream);
    return launch_shape<64>(step, args, weights, stream);
}
