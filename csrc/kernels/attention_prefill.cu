// attention_prefill.cu -- attention for sequences with many new tokens: query rows are shared out.
//
//   out[row] = fold of segments, ascending, of folds of tiles, ascending
//
// Shapes    as in attention.cu; any number of rows
// Rounding  docs/numerics.md section 4; wgmma's steps are those of mma.sync, bit for bit
// Mapping   a thread block per 128 query rows (new tokens x heads of the group) and kv head: one warp asks
// the
//           copy engine for K and V tiles, two warpgroups take 64 rows each. A group multiplies P V of one
//           tile and the scores of the next while it folds; folds happen in registers
// Cost      256 flops per row and key, and some 17 instructions: bound by the issue of those instructions
// See       attention.cu, twin/attention.c, tests/kernels/test_bits_attention.py

#include "../common/wgmma.cuh"
#include "attention.cuh"

constexpr int kWarpgroup = 128;
constexpr int kWarpgroupWarps = kWarpgroup / kWarp;
constexpr int kConsumers = 2;
constexpr int kThreads = (1 + kConsumers) * kWarpgroup;
constexpr int kProducerRegisters = 24;  // per thread; 128 x 24 + 256 x 240 of the multiprocessor's 65536
constexpr int kConsumerRegisters = 240;
constexpr int kConsumerRows = 64;  // rows of one wgmma
constexpr int kBlockRows = kConsumers * kConsumerRows;
constexpr int kQueryBytes = kConsumerRows * kHeadDim * (int)sizeof(bf16);
constexpr int kStages = 4;
constexpr int kStageBytes = 2 * kKvTileBytes;
constexpr int kAlignment = 1024;  // of a swizzled tile
constexpr int kSharedBytes = kConsumers * kQueryBytes + kStages * kStageBytes + kAlignment;
constexpr int kRowBytes = kHeadDim * (int)sizeof(bf16);
constexpr int kStepColumnBytes = NUMERICS_STEP * (int)sizeof(bf16);  // 16 of a tile's columns
constexpr int kStepRowBytes = NUMERICS_STEP * kRowBytes;             // 16 of its rows
constexpr int kScores = kConsumerRows * kTileKeys / kWarpgroup;      // of a thread
constexpr int kOutputs = kConsumerRows * kHeadDim / kWarpgroup;
constexpr float kInfinity = __builtin_huge_valf();
constexpr float kSmallestExponent = -126.0f;  // below it the contract's exp2 is zero

// `full` counts the producer and the bytes; `empty` every consuming warp.
struct AttentionBarriers {
    uint64_t full[kStages];
    uint64_t empty[kStages];
};

// What a warp knows of its 16 rows after some tiles: this lane's rows group and group + 8 (index `half`),
// of their outputs out[4 f + 2 half + column] is column 8 f + 2 quad + column.
struct RowSums {
    float max[2];
    float sum[2];
    float out[kOutputs];
};

// The smaller of two, NaN if either is.
static __device__ __forceinline__ float min_or_nan(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
}

// contract_exp2 of an x known to be in [-126, 1): no case is special.
static __device__ __forceinline__ float exp2_in_range(float x) {
    const float kRoundToInteger = 12582912.0f;
    float shifted = __fadd_rn(x, kRoundToInteger);
    float f = __fsub_rn(x, __fsub_rn(shifted, kRoundToInteger));
    float p = __int_as_float(EXP2_C6);
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C5));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C4));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C3));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C2));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C1));
    p = __fmaf_rn(p, f, __int_as_float(EXP2_C0));
    return __int_as_float(__float_as_int(p) + (__float_as_int(shifted) << 23));
}

// P of one tile as the second product takes it, and its row sums. `visible` is asked only where kIsSpecial:
// some key is masked, or keys of a row are of very different size, or not finite.
template <bool kIsSpecial>
static __device__ __forceinline__ void exponentiate(uint32_t (&weights)[kKeySteps][4], RowSums &tile,
                                                    const float (&scores)[kScores], const int (&visible)[2],
                                                    float scale, int lane) {
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int f = 0; f < kKeyFragments; ++f) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float p[2];
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                float x = __fmaf_rn(scores[4 * f + 2 * half + column], scale, -tile.max[half]);
                if constexpr (kIsSpecial) {
                    int key = f * 8 + 2 * (lane % 4) + column;
                    p[column] = key < visible[half] ? contract_exp2(x) : 0.0f;
                } else {
                    p[column] = exp2_in_range(x);
                }
            }
            uint32_t pair = pack_bf16(p[0], p[1]);
            weights[f / 2][f % 2 * 2 + half] = pair;
            sum[half] = __fadd_rn(sum[half], __fadd_rn(low_float(pair), high_float(pair)));
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) tile.sum[half] = quad_sum(sum[half]);
}

// One tile's scores to its P, maximum and sum. Row `half` sees the first visible[half] keys; where that is
// none, the result is meaningless and must not be folded. `is_masked`: some row of the warp does not see
// all.
static __device__ __forceinline__ void soften(uint32_t (&weights)[kKeySteps][4], RowSums &tile,
                                              const float (&scores)[kScores], const int (&visible)[2],
                                              bool is_masked, float scale, int lane) {
    float largest[2] = {-kInfinity, -kInfinity}, smallest[2] = {kInfinity, kInfinity};
    bool is_in_range = !is_masked;
    if (is_masked) {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            int half = i % 4 / 2, key = i / 4 * 8 + 2 * (lane % 4) + i % 2;
            if (key < visible[half]) largest[half] = fmaxf(largest[half], scores[i]);
        }
    } else {
#pragma unroll
        for (int i = 0; i < kScores; ++i) {
            int half = i % 4 / 2;
            largest[half] = fmaxf(largest[half], scores[i]);
            smallest[half] = min_or_nan(smallest[half], scores[i]);
        }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        tile.max[half] = __fmul_rn(quad_max(largest[half]), scale);
        is_in_range &= __fmaf_rn(smallest[half], scale, -tile.max[half]) >= kSmallestExponent;
    }
    if (__all_sync(kFullWarp, is_in_range)) {
        exponentiate<false>(weights, tile, scores, visible, scale, lane);
    } else {
        exponentiate<true>(weights, tile, scores, visible, scale, lane);
    }
}

// One of a fold's two factors is exp2(0) = 1; the other depends on the difference alone.
static __device__ __forceinline__ FoldFactors fold_row(float &max, float &sum, float new_max,
                                                       float new_sum) {
    float difference = __fsub_rn(max, new_max);
    float shrink = contract_exp2(-fabsf(difference));
    FoldFactors factors = {difference >= 0.0f ? 1.0f : shrink, difference >= 0.0f ? shrink : 1.0f};
    max = fmaxf(max, new_max);
    sum = __fmaf_rn(new_sum, factors.take, __fmul_rn(sum, factors.keep));
    return factors;
}

// Folds `next` into `state` for the rows that take part; a row's first contribution is taken as it is.
// Without branches that part a warp: the tensor cores are at work on the next tile.
template <bool kAll>
static __device__ __forceinline__ void fold_halves(RowSums &state, const RowSums &next,
                                                   const bool (&takes_part)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float max = state.max[half], sum = state.sum[half];
        FoldFactors factors = fold_row(max, sum, next.max[half], next.sum[half]);
        state.max[half] = kAll || takes_part[half] ? max : state.max[half];
        state.sum[half] = kAll || takes_part[half] ? sum : state.sum[half];
#pragma unroll
        for (int i = 0; i < kOutputs; ++i) {
            if (i % 4 / 2 != half) continue;
            float value = fold_value(state.out[i], next.out[i], factors);
            state.out[i] = kAll || takes_part[half] ? value : state.out[i];
        }
    }
}

static __device__ __forceinline__ void fold_rows(RowSums &state, const RowSums &next, bool is_first,
                                                 const bool (&takes_part)[2]) {
    if (is_first) {
        state = next;
    } else if (__all_sync(kFullWarp, takes_part[0] && takes_part[1])) {
        fold_halves<true>(state, next, takes_part);
    } else {
        fold_halves<false>(state, next, takes_part);
    }
}

static __device__ __forceinline__ void store_rows(const AttentionProblem &problem, const Sequence &sequence,
                                                  const RowSums &state, int kv_head, int first_row,
                                                  int lane) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = first_row + lane / 4 + 8 * half;
        if (row >= sequence.num_rows(problem.group_size)) continue;
        int token = sequence.first_token + row / problem.group_size;
        int head = kv_head * problem.group_size + row % problem.group_size;
        bf16 *to = problem.out + ((size_t)token * problem.num_heads + head) * kHeadDim + 2 * (lane % 4);
        float inverse = __frcp_rn(state.sum[half]);
#pragma unroll
        for (int f = 0; f < kDimFragments; ++f) {
            *reinterpret_cast<uint32_t *>(to + f * 8) =
                pack_bf16(__fmul_rn(state.out[4 * f + 2 * half], inverse),
                          __fmul_rn(state.out[4 * f + 2 * half + 1], inverse));
        }
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
static __device__ __forceinline__ void attend(uint32_t query, uint32_t ring, AttentionBarriers &barriers,
                                              const AttentionProblem &problem, const Sequence &sequence,
                                              int kv_head, int group_row, int num_tiles_needed,
                                              int warp_in_group, int lane) {
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
    RowSums tile_sums, segment, total;
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
        fold_rows(segment, tile_sums, tile % NUMERICS_SEGMENT == 0, sees_tile);
        if (tile % NUMERICS_SEGMENT == NUMERICS_SEGMENT - 1 || tile + 1 == num_tiles) {
            int segment_start = tile / NUMERICS_SEGMENT * kSegmentKeys;
            bool sees_segment[2] = {low_position >= segment_start, high_position >= segment_start};
            fold_rows(total, segment, tile < NUMERICS_SEGMENT, sees_segment);
        }
    }
    for (int tile = num_tiles; tile < num_tiles_needed; ++tile) {
        barrier_wait(shared_address(&barriers.full[tile % kStages]), tile / kStages % 2);
        release(tile);
    }
    if (num_tiles > 0) store_rows(problem, sequence, total, kv_head, warp_row, lane);
}

static __global__ void __launch_bounds__(kThreads, 1)
    attention_prefill_kernel(AttentionProblem problem, bool takes_all) {
    extern __shared__ unsigned char shared[];
    __shared__ AttentionBarriers barriers;
    Sequence sequence(problem, blockIdx.y);
    if (!takes_all && fits_decode(sequence.num_new, problem.group_size)) return;  // the decode kernel's
    int num_rows = sequence.num_rows(problem.group_size);
    int num_kv_heads = problem.cache.num_kv_heads, kv_head = (int)blockIdx.x % num_kv_heads;
    // Long rows first, of every head: they take longest.
    int first_row = ((int)(gridDim.x - 1 - blockIdx.x) / num_kv_heads) * kBlockRows;
    if (first_row >= num_rows) return;
    uint32_t query = (shared_address(shared) + kAlignment - 1) / kAlignment * kAlignment;
    uint32_t ring = query + kConsumers * kQueryBytes;
    // From lane 0, so that the compiler knows it the same for the whole warp.
    int warp = __shfl_sync(kFullWarp, (int)threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
    int warpgroup = warp / kWarpgroupWarps;
    int last_position = sequence.position(min(first_row + kBlockRows, num_rows) - 1, problem.group_size);
    int num_tiles_needed = last_position / kTileKeys + 1;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            barrier_init(shared_address(&barriers.full[i]), 1);
            barrier_init(shared_address(&barriers.empty[i]), kConsumers * kWarpgroupWarps);
        }
        barrier_init_fence();
    }
    int group_row = first_row + (warpgroup - 1) * kConsumerRows;
    uint32_t own_query = query + (warpgroup - 1) * kQueryBytes;
    if (warpgroup > 0)
        stage_query(own_query, problem, sequence, kv_head, group_row, threadIdx.x % kWarpgroup);
    __syncthreads();  // barriers are initialised, queries are staged
    if (warpgroup == 0) {
        give_registers<kProducerRegisters>();
        if (warp == 0) produce(ring, barriers, problem.cache, sequence, kv_head, num_tiles_needed, lane);
    } else {
        take_registers<kConsumerRegisters>();
        attend(own_query, ring, barriers, problem, sequence, kv_head, group_row, num_tiles_needed,
               warp % kWarpgroupWarps, lane);
    }
}

Status launch_attention_prefill(const AttentionProblem &problem, bool takes_all, cudaStream_t stream) {
    int64_t max_rows = (int64_t)problem.max_seq_len_q * problem.group_size;
    dim3 grid((unsigned)((max_rows + kBlockRows - 1) / kBlockRows * problem.cache.num_kv_heads),
              (unsigned)problem.num_seqs);
    TRY(CUDA_STATUS(cudaFuncSetAttribute(attention_prefill_kernel,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)));
    attention_prefill_kernel<<<grid, kThreads, kSharedBytes, stream>>>(problem, takes_all);
    return CUDA_STATUS(cudaGetLastError());
}
