// attention_prefill.cu -- attention for sequences with many new tokens: query rows are shared out.
//
//   out[row] = fold of segments, ascending, of folds of tiles, ascending
//
// Shapes    as in attention.cu; any number of rows
// Rounding  docs/numerics.md section 4
// Mapping   a thread block per 64 query rows (new tokens x heads of the group) and kv head, 16 rows per
// warp;
//           K and V tiles pass through two stages of shared memory, folds happen in registers
// Cost      256 flops per row and key, about as many exponentials: bound by both
// See       attention.cu, twin/attention.c, tests/kernels/test_bits_attention.py

#include "attention.cuh"

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * kWarp;
constexpr int kBlockRows = kWarps * kFragmentRows;
constexpr int kStages = 2;
constexpr int kStageBytes = 2 * kKvTileBytes;

// Folds `next` into `state` for the rows that took part; a row's first contribution is taken as it is.
static __device__ __forceinline__ void fold_rows(RowState &state, const RowState &next, bool is_first,
                                                 const bool (&takes_part)[2]) {
    if (is_first) {
        state = next;
        return;
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (!takes_part[half]) continue;
        FoldFactors factors = fold_sums(state.max[half], state.sum[half], next.max[half], next.sum[half]);
#pragma unroll
        for (int f = 0; f < kDimFragments; ++f) {
#pragma unroll
            for (int column = 0; column < 2; ++column) {
                float &value = state.out[f][2 * half + column];
                value = fold_value(value, next.out[f][2 * half + column], factors);
            }
        }
    }
}

static __device__ __forceinline__ void store_rows(const AttentionProblem &problem, const Sequence &sequence,
                                                  const RowState &state, int kv_head, int first_row,
                                                  int lane) {
    int group = lane / 4, quad = lane % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        int row = first_row + group + 8 * half;
        if (row >= sequence.num_rows(problem.group_size)) continue;
        int token = sequence.first_token + row / problem.group_size;
        int head = kv_head * problem.group_size + row % problem.group_size;
        bf16 *to = problem.out + ((size_t)token * problem.num_heads + head) * kHeadDim + 2 * quad;
        float inverse = __frcp_rn(state.sum[half]);
#pragma unroll
        for (int f = 0; f < kDimFragments; ++f) {
            *reinterpret_cast<uint32_t *>(to + f * 8) = pack_bf16(
                __fmul_rn(state.out[f][2 * half], inverse), __fmul_rn(state.out[f][2 * half + 1], inverse));
        }
    }
}

static __global__ void __launch_bounds__(kThreads, 2)
    attention_prefill_kernel(AttentionProblem problem, bool takes_all) {
    extern __shared__ __align__(128) unsigned char shared[];
    Sequence sequence(problem, blockIdx.z);
    if (!takes_all && fits_decode(sequence.num_new, problem.group_size)) return;  // the decode kernel's
    int num_rows = sequence.num_rows(problem.group_size);
    int first_row =
        ((int)gridDim.x - 1 - (int)blockIdx.x) * kBlockRows;  // long rows first: they take longest
    if (first_row >= num_rows) return;
    int kv_head = blockIdx.y, warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
    uint32_t stages = shared_address(shared);

    int last_position = sequence.position(min(first_row + kBlockRows, num_rows) - 1, problem.group_size);
    int num_tiles_needed = last_position / kTileKeys + 1;
    int warp_row = first_row + warp * kFragmentRows;
    int warp_last = sequence.position(min(warp_row + kFragmentRows, num_rows) - 1, problem.group_size);
    int positions[2];  // of the two rows this lane holds
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        positions[half] =
            sequence.position(min(warp_row + lane / 4 + 8 * half, num_rows - 1), problem.group_size);
    }
    auto fill = [&](int tile) {
        if (tile < num_tiles_needed) {
            uint32_t stage = stages + tile % kStages * kStageBytes;
            fill_kv_tile<kThreads>(stage, stage + kKvTileBytes, problem.cache, sequence, kv_head, tile,
                                   (int)threadIdx.x);
        }
        copy_async_commit();  // an empty group keeps the count
    };

    fill(0);
    uint32_t query[kQuerySteps][4];
    load_query(query, problem, sequence, kv_head, warp_row, lane);
    RowState segment, total;
    for (int tile = 0; tile < num_tiles_needed; ++tile) {
        fill(tile + 1);
        copy_async_wait<1>();
        __syncthreads();  // the tile has arrived for every thread
        if (warp_row < num_rows && tile * kTileKeys <= warp_last) {
            RowState state;
            uint32_t stage = stages + tile % kStages * kStageBytes;
            int visible[2] = {positions[0] + 1 - tile * kTileKeys, positions[1] + 1 - tile * kTileKeys};
            attend_tile(state, query, stage, stage + kKvTileBytes, visible, problem.scale, lane);
            bool sees_tile[2] = {visible[0] > 0, visible[1] > 0};
            fold_rows(segment, state, tile % NUMERICS_SEGMENT == 0, sees_tile);
            bool ends_segment =
                tile % NUMERICS_SEGMENT == NUMERICS_SEGMENT - 1 || (tile + 1) * kTileKeys > warp_last;
            if (ends_segment) {
                int segment_start = tile / NUMERICS_SEGMENT * kSegmentKeys;
                bool sees_segment[2] = {positions[0] >= segment_start, positions[1] >= segment_start};
                fold_rows(total, segment, tile < NUMERICS_SEGMENT, sees_segment);
            }
        }
        __syncthreads();  // every warp has read the stage before it is filled again
    }
    if (warp_row < num_rows) store_rows(problem, sequence, total, kv_head, warp_row, lane);
}

Status launch_attention_prefill(const AttentionProblem &problem, bool takes_all, cudaStream_t stream) {
    constexpr int kSharedBytes = kStages * kStageBytes;
    int64_t max_rows = (int64_t)problem.max_seq_len_q * problem.group_size;
    dim3 grid((unsigned)((max_rows + kBlockRows - 1) / kBlockRows), (unsigned)problem.cache.num_kv_heads,
              (unsigned)problem.num_seqs);
    TRY(CUDA_STATUS(cudaFuncSetAttribute(attention_prefill_kernel,
                                         cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)));
    attention_prefill_kernel<<<grid, kThreads, kSharedBytes, stream>>>(problem, takes_all);
    return CUDA_STATUS(cudaGetLastError());
}
