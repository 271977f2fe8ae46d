// attention_prefill.cu -- attention for sequences with many new tokens: query rows are shared out.
//
//   out[row] = fold of segments, ascending, of folds of tiles, ascending
//
// Shapes    as in attention.cu; any number of rows
// Rounding  docs/numerics.md section 4; wgmma's steps are those of mma.sync, bit for bit
// Mapping   a thread block per 192 query rows (new tokens x heads of the group) and kv head, or per 128
//           where so few fit the card at once: one warp asks the copy engine for K and V tiles, three or two
//           warpgroups take 64 rows each. A group multiplies P V of one tile and the scores of the next
//           while it folds; what is folded lies in shared memory
// Cost      256 flops per row and key, and some 12 instructions: bound by their latency (docs/log.md)
// See       attention.cu, twin/attention.c, tests/kernels/test_bits_attention.py

#include "../common/launch.cuh"
#include "../common/wgmma.cuh"
#include "attention_fold.cuh"

constexpr int kWarpgroupWarps = kWarpgroup / kWarp;
constexpr int kProducerRegisters = 32;  // per thread
constexpr int kQueryBytes = kConsumerRows * kHeadDim * (int)sizeof(bf16);
constexpr int kStages = 3;
constexpr int kStageBytes = 2 * kKvTileBytes;
constexpr int kAlignment = 1024;  // of a swizzled tile
constexpr int kRowBytes = kHeadDim * (int)sizeof(bf16);
constexpr int kStepColumnBytes = NUMERICS_STEP * (int)sizeof(bf16);  // 16 of a tile's columns
constexpr int kStepRowBytes = NUMERICS_STEP * kRowBytes;             // 16 of its rows

// A thread block of so many warpgroups that compute.
template <int kConsumers>
struct BlockShape {
    static constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
    static constexpr int kRows = kConsumers * kConsumerRows;
    // Every thread starts with its share of the 65536 registers, a multiple of eight.
    static constexpr int kStartRegisters = 65536 / kThreads / 8 * 8;
    static constexpr int kConsumerRegisters = kConsumers == 3 ? 160 : 232;
    static_assert(kProducerRegisters + kConsumers * kConsumerRegisters <=
                      (1 + kConsumers) * kStartRegisters,
                  "nobody gets registers that nobody gives back: the kernel would wait for ever");
    static constexpr int kSharedBytes =
        kConsumers * (kQueryBytes + 2 * kFoldedBytes) + kStages * kStageBytes + kAlignment;
};

// `full` counts the producer and the bytes; `empty` every consuming warp.
struct AttentionBarriers {
    uint64_t full[kStages];
    uint64_t empty[kStages];

    __device__ __forceinline__ void init(int num_consumer_warps) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(shared_address(&full[i]), 1);
            barrier_init(shared_address(&empty[i]), num_consumer_warps);
        }
        barrier_init_fence();
    }
};

static __device__ __forceinline__ void store_rows(const AttentionProblem &problem, const Sequence &sequence,
                                                  const FoldedSums &state, int kv_head, int first_row,
                                                  int lane) {
    bf16 *to[2];
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = first_row + lane / 4 + 8 * half;
        int token = sequence.first_token + row / problem.group_size;
        int head = kv_head * problem.group_size + row % problem.group_size;
        to[half] = problem.out + ((size_t)token * problem.num_heads + head) * kHeadDim + 2 * (lane % 4);
        if (row >= sequence.num_rows(problem.group_size)) to[half] = nullptr;
        inverse[half] = __frcp_rn(state.sum[half]);
    }
#pragma unroll
    for (int f = 0; f < kDimFragments; ++f) {
        float4 out = state.load(f);
        uint32_t low = pack_bf16(__fmul_rn(out.x, inverse[0]), __fmul_rn(out.y, inverse[0]));
        uint32_t high = pack_bf16(__fmul_rn(out.z, inverse[1]), __fmul_rn(out.w, inverse[1]));
        if (to[0]) *reinterpret_cast<uint32_t *>(to[0] + f * 8) = low;
        if (to[1]) *reinterpret_cast<uint32_t *>(to[1] + f * 8) = high;
    }
}

// One warp brings tile after tile: a lane per KV block. Keys that the sequence does not have are masked,
// their V becomes zero.
static __device__ __forceinline__ void produce(uint32_t ring, AttentionBarriers &barriers,
                                               const KvLayer &cache, const Sequence &sequence, int kv_head,
                                               int num_tiles_needed, int lane) {
    for (int tile = 0; tile < num_tiles_needed; ++tile) {
        int stage = tile % kStages, num_keys = min(kTileKeys, sequence.len - tile * kTileKeys);
        uint32_t full = shared_address(&barriers.full[stage]);
        uint32_t k_tile = ring + stage * kStageBytes, v_tile = k_tile + kKvTileBytes;
        barrier_wait(shared_address(&barriers.empty[stage]), (tile / kStages + 1) % 2);
        for (int at = num_keys * kRowBytes + lane * 16; at < kKvTileBytes; at += kWarp * 16)
            store_shared_zero_16(v_tile + at);
        fence_async_proxy();
        __syncwarp();  // the zeros are stored before the first arrive
        if (lane == 0) barrier_arrive_expect(full, 2 * num_keys * kRowBytes);
        __syncwarp();  // the bytes are expected before they arrive
        int first_key = lane * cache.block_size;
        if (first_key < num_keys) {
            int block = sequence.block_table[(tile * kTileKeys + first_key) / cache.block_size];
            const bf16 *k =
                cache.data + kv_tile_offset(block, kv_head, cache.num_kv_heads, cache.block_size);
            int bytes = min(cache.block_size, num_keys - first_key) * kRowBytes;
            copy_bulk(k_tile + first_key * kRowBytes, k, bytes, full);
            copy_bulk(v_tile + first_key * kRowBytes, k + cache.block_size * kHeadDim, bytes, full);
        }
    }
}

// The 64 query rows of a warpgroup into shared memory; rows beyond the last are zero.
static __device__ __forceinline__ void stage_query(uint32_t to, const AttentionProblem &problem,
                                                   const Sequence &sequence, int kv_head, int first_row,
                                                   int thread) {
    constexpr int kRowsAtOnce = kWarpgroup / kChunksPerRow;
#pragma unroll
    for (int pass = 0; pass < kConsumerRows / kRowsAtOnce; ++pass) {
        int place = pass * kRowsAtOnce + thread / kChunksPerRow, chunk = thread % kChunksPerRow;
        int row = first_row + place;
        bool exists = row < sequence.num_rows(problem.group_size);
        int token = sequence.first_token + row / problem.group_size;
        int head = kv_head * problem.group_size + row % problem.group_size;
        const bf16 *from = exists ? problem.q + ((size_t)token * problem.num_heads + head) * kHeadDim +
                                        chunk * kChunkValues
                                  : problem.q;
        copy_async_16(to + tile_offset(place, chunk) * (int)sizeof(bf16), from, exists ? 16 : 0);
    }
    copy_async_commit();
    copy_async_wait<0>();
    fence_async_proxy();
}

// One warpgroup's 64 rows from the first tile to the result.
static __device__ __forceinline__ void attend(uint32_t query, uint32_t folded, uint32_t ring,
                                              AttentionBarriers &barriers, const AttentionProblem &problem,
                                              const Sequence &sequence, int kv_head, int group_row,
                                              int num_tiles_needed, int warp_in_group, int lane) {
    int num_rows = sequence.num_rows(problem.group_size);
    int warp_row = group_row + warp_in_group * kFragmentRows;
    int first_position = sequence.position(min(warp_row, num_rows - 1), problem.group_size);
    int last_row = min(group_row + kConsumerRows, num_rows) - 1;
    int last_position = sequence.position(last_row, problem.group_size);
    int low_position = sequence.position(min(warp_row + lane / 4, num_rows - 1), problem.group_size);
    int high_position = sequence.position(min(warp_row + lane / 4 + 8, num_rows - 1), problem.group_size);
    // A group without rows still hands every stage back.
    int num_tiles = group_row < num_rows ? last_position / kTileKeys + 1 : 0;
    uint64_t q = matrix_descriptor(query);
    float scores[kScores];
    TileSums tile_sums;
    FoldedSums segment = {folded}, total = {folded + kFoldedBytes};
    auto segment_out = [&](int f) { return segment.load(f); };
    auto tile_out = [&](int f) {
        const float *out = &tile_sums.out[4 * f];
        return make_float4(out[0], out[1], out[2], out[3]);
    };
    auto wait_and_score = [&](int tile) {
        int stage = tile % kStages;
        barrier_wait(shared_address(&barriers.full[stage]), tile / kStages % 2);
        uint64_t k = matrix_descriptor(ring + stage * kStageBytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kQuerySteps; ++step) {
            uint64_t offset = (uint64_t)(step * kStepColumnBytes >> 4);
            wgmma_k16(scores, q + offset, k + offset, step > 0);
        }
        wgmma_commit();
    };
    auto release = [&](int tile) {
        if (lane == 0) barrier_arrive(shared_address(&barriers.empty[tile % kStages]));
    };

    if (num_tiles > 0) wait_and_score(0);
    for (int tile = 0; tile < num_tiles; ++tile) {
        int first_key = tile * kTileKeys;
        int visible[2] = {low_position + 1 - first_key, high_position + 1 - first_key};
        uint32_t weights[kKeySteps][4];
        wgmma_wait<0>();
        soften(weights, tile_sums, scores, visible, first_position + 1 - first_key < kTileKeys,
               problem.scale, lane);
        uint64_t v = matrix_descriptor(ring + tile % kStages * kStageBytes + kKvTileBytes);
        wgmma_fence();
#pragma unroll
        for (int step = 0; step < kKeySteps; ++step) {
            wgmma_k16(tile_sums.out, weights[step], v + (uint64_t)(step * kStepRowBytes >> 4), step > 0);
        }
        wgmma_commit();
        if (tile + 1 < num_tiles) {
            wait_and_score(tile + 1);
            wgmma_wait<1>();
        } else {
            wgmma_wait<0>();
        }
        release(tile);
        bool sees_tile[2] = {visible[0] > 0, visible[1] > 0};
        fold_rows(segment, tile_sums.max, tile_sums.sum, tile % NUMERICS_SEGMENT == 0, sees_tile, tile_out);
        if (tile % NUMERICS_SEGMENT == NUMERICS_SEGMENT - 1 || tile + 1 == num_tiles) {
            int segment_start = tile / NUMERICS_SEGMENT * kSegmentKeys;
            bool sees_segment[2] = {low_position >= segment_start, high_position >= segment_start};
            fold_rows(total, segment.max, segment.sum, tile < NUMERICS_SEGMENT, sees_segment, segment_out);
        }
    }
    for (int tile = num_tiles; tile < num_tiles_needed; ++tile) {
        barrier_wait(shared_address(&barriers.full[tile % kStages]), tile / kStages % 2);
        release(tile);
    }
    if (num_tiles > 0) store_rows(problem, sequence, total, kv_head, warp_row, lane);
}

template <int kConsumers>
static __global__ void __launch_bounds__(BlockShape<kConsumers>::kThreads, 1)
    attention_prefill_kernel(AttentionProblem problem, bool takes_all) {
    constexpr int kBlockRows = BlockShape<kConsumers>::kRows;
    extern __shared__ unsigned char shared[];
    __shared__ AttentionBarriers barriers;
    let_next_kernel_start();
    Sequence sequence(problem, blockIdx.y);  // a step's index arrays are there before its first kernel
    if (threadIdx.x == 0) barriers.init(kConsumers * kWarpgroupWarps);
    wait_for_previous_kernel();
    if (!takes_all && fits_decode(sequence.num_new, problem.group_size)) return;  // the decode kernel's
    int num_rows = sequence.num_rows(problem.group_size);
    int num_kv_heads = problem.cache.num_kv_heads, kv_head = (int)blockIdx.x % num_kv_heads;
    // Long rows first, of every head: they take longest.
    int first_row = ((int)(gridDim.x - 1 - blockIdx.x) / num_kv_heads) * kBlockRows;
    if (first_row >= num_rows) return;
    uint32_t query = (shared_address(shared) + kAlignment - 1) / kAlignment * kAlignment;
    uint32_t ring = query + kConsumers * kQueryBytes, folded = ring + kStages * kStageBytes;
    // From lane 0, so that the compiler knows it the same for the whole warp.
    int warp = __shfl_sync(kFullWarp, (int)threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
    int warpgroup = warp / kWarpgroupWarps;
    int last_position = sequence.position(min(first_row + kBlockRows, num_rows) - 1, problem.group_size);
    int num_tiles_needed = last_position / kTileKeys + 1;
    int group_row = first_row + (warpgroup - 1) * kConsumerRows;
    uint32_t own_query = query + (warpgroup - 1) * kQueryBytes;
    if (warpgroup > 0)
        stage_query(own_query, problem, sequence, kv_head, group_row, threadIdx.x % kWarpgroup);
    __syncthreads();  // barriers are initialised, queries are staged
    if (warpgroup == 0) {
        give_registers<kProducerRegisters>();
        if (warp == 0) produce(ring, barriers, problem.cache, sequence, kv_head, num_tiles_needed, lane);
    } else {
        take_registers<BlockShape<kConsumers>::kConsumerRegisters>();
        attend(own_query,
               folded + (warpgroup - 1) * 2 * kFoldedBytes + threadIdx.x % kWarpgroup * (int)sizeof(float4),
               ring, barriers, problem, sequence, kv_head, group_row, num_tiles_needed,
               warp % kWarpgroupWarps, lane);
    }
}

template <int kConsumers>
static int num_row_blocks(const AttentionProblem &problem) {
    constexpr int kRows = BlockShape<kConsumers>::kRows;
    int64_t max_rows = (int64_t)problem.max_seq_len_q * problem.group_size;
    return (int)((max_rows + kRows - 1) / kRows);
}

template <int kConsumers>
static Status launch(const AttentionProblem &problem, bool takes_all, cudaStream_t stream) {
    using Shape = BlockShape<kConsumers>;
    dim3 grid((unsigned)(num_row_blocks<kConsumers>(problem) * problem.cache.num_kv_heads),
              (unsigned)problem.num_seqs);
    return launch_chained(attention_prefill_kernel<kConsumers>, grid, Shape::kThreads, Shape::kSharedBytes,
                          1, stream, problem, takes_all);
}

Status launch_attention_prefill(const AttentionProblem &problem, bool takes_all, cudaStream_t stream) {
    int device, num_multiprocessors;
    TRY(CUDA_STATUS(cudaGetDevice(&device)));
    TRY(CUDA_STATUS(cudaDeviceGetAttribute(&num_multiprocessors, cudaDevAttrMultiProcessorCount, device)));
    // Smaller blocks where all of them run at once: each is done sooner.
    int64_t small = (int64_t)num_row_blocks<2>(problem) * problem.cache.num_kv_heads * problem.num_seqs;
    return small <= num_multiprocessors ? launch<2>(problem, takes_all, stream)
                                        : launch<3>(problem, takes_all, stream);
}
