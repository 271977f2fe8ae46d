// qkv_linear.cu -- attention's three linear layers for many tokens, rotated and written to the KV cache.
//
//   q[t] = rotate(x[t] Wqᵀ);  slot_mapping[t] of the cache: K = rotate(x[t] Wkᵀ), V = x[t] Wvᵀ
//
// Shapes    x [num_tokens, hidden_size] bf16, hidden_size a multiple of 64; q_proj, k_proj, v_proj packed;
//           q [num_tokens, num_heads, 64]; cache as in kv_cache.cu; rope table as in rotary_embedding.cu
// Rounding  those of linear.cu and rotary_embedding.cu, one after the other
// Mapping   linear_many.cuh; a tile is two heads of whichever matrix: columns i and i + 32 of a
// head
//           are in one thread
// Cost      2 flops per token, row and k: bound by the tensor cores
// See       linear.cu, rotary_embedding.cu, kv_cache.cu, tests/system/test_fused_prefill.py

#include "../common/kv_tile.cuh"
#include "linear_many.cuh"

constexpr int kHeadFragments = kTileCols / 8;
constexpr int kPairFragments = kHeadFragments / 2;
constexpr int kHeadSums = kTileCols / 2;  // of one head in a thread's sums
constexpr int kRowsHeld = 2;              // token rows group and group + 8

static __device__ __forceinline__ float bf16_product(float a, float b) {
    return to_float(to_bf16(__fmul_rn(a, b)));
}

struct ProjectHeads {
    static constexpr int kParts = kBlockRows / kTileCols;
    bf16 *q;
    KvLayer cache;
    const bf16 *table;
    const int32_t *positions;
    const int32_t *slot_mapping;
    int num_heads;

    // Heads are counted through the three matrices; beyond the last, rows that do not exist.
    __device__ __forceinline__ PartPlace part(int row_tile, int p) const {
        int head = row_tile * kParts + p, matrix = 0, num = num_heads;
        if (head >= num_heads) {
            head -= num_heads;
            num = cache.num_kv_heads;
            matrix = head < num ? 1 : 2;
            head -= head < num ? 0 : num;
        }
        return {matrix, head * kTileCols};
    }

    // Rounds one head's sums in place and, unless it is V's, rotates them.
    __device__ __forceinline__ void rotate(float *sum, const uint32_t (&cosine)[kRowsHeld][kPairFragments],
                                           const uint32_t (&sine)[kRowsHeld][kPairFragments]) const {
#pragma unroll
        for (int f = 0; f < kPairFragments; ++f) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                uint32_t cos_pair = cosine[e / 2][f], sin_pair = sine[e / 2][f];
                float c = e % 2 ? high_float(cos_pair) : low_float(cos_pair);
                float s = e % 2 ? high_float(sin_pair) : low_float(sin_pair);
                float &first = sum[4 * f + e], &second = sum[4 * (f + kPairFragments) + e];
                float low = to_float(to_bf16(first)), high = to_float(to_bf16(second));
                first = __fsub_rn(bf16_product(low, c), bf16_product(high, s));
                second = __fadd_rn(bf16_product(high, c), bf16_product(low, s));
            }
        }
    }

    __device__ __forceinline__ bf16 *place_of(int token, int head, int chunk) const {
        if (head < num_heads)
            return q + ((size_t)token * num_heads + head) * kTileCols + chunk * kChunkValues;
        int kv_head = head - num_heads;
        bool is_value = kv_head >= cache.num_kv_heads;
        if (is_value) kv_head -= cache.num_kv_heads;
        int slot = slot_mapping[token], offset = slot % cache.block_size;
        bf16 *tile = cache.data +
                     kv_tile_offset(slot / cache.block_size, kv_head, cache.num_kv_heads, cache.block_size);
        return tile + (is_value ? cache.block_size * kTileCols : 0) + tile_offset(offset, chunk);
    }

    __device__ __forceinline__ void finish(float (&sum)[kSums], const WarpTile &tile) const {
        int first_head = tile.row_tile * kParts, last_rotated = num_heads + cache.num_kv_heads - 1;
        uint32_t cosine[kRowsHeld][kPairFragments], sine[kRowsHeld][kPairFragments];
#pragma unroll
        for (int half = 0; half < kRowsHeld; ++half) {
            int token = min(tile.first_token + tile.lane / 4 + 8 * half, tile.num_tokens - 1);
            const bf16 *row = table + (size_t)positions[token] * kTileCols + 2 * (tile.lane % 4);
#pragma unroll
            for (int f = 0; f < kPairFragments; ++f) {
                cosine[half][f] = load_pair(row + 8 * f);
                sine[half][f] = load_pair(row + kTileCols / 2 + 8 * f);
            }
        }
#pragma unroll
        for (int head = 0; head < kParts; ++head)
            if (first_head + head <= last_rotated) rotate(sum + head * kHeadSums, cosine, sine);
        stage_sums(sum, tile);
        int num_all = num_heads + 2 * cache.num_kv_heads;
        take_staged<kBlockRows>(tile, [&](int token_row, int chunk, uint4 values) {
            int token = tile.first_token + token_row, head = first_head + chunk / kChunksPerRow;
            if (token < tile.num_tokens && head < num_all)
                store_vector(place_of(token, head, chunk % kChunksPerRow), values);
        });
    }
};

extern "C" Status cuda_qkv_linear(bf16 *q, const KvLayer *cache, const bf16 *x, const Matrix *q_proj,
                                  const Matrix *k_proj, const Matrix *v_proj, const bf16 *table,
                                  const int32_t *positions, const int32_t *slot_mapping, int num_tokens,
                                  Stream stream) {
    if (cache->head_dim != kTileCols) {
        return fail(STATUS_INVALID_ARGUMENT, "head_dim must be %d, got %d", kTileCols, cache->head_dim);
    }
    if (num_tokens == 0) return STATUS_OK;
    ManyOperands operands = {x, num_tokens, {q_proj, k_proj, v_proj}, 3};
    ProjectHeads heads = {q, *cache, table, positions, slot_mapping, q_proj->rows / kTileCols};
    return launch_many(heads, operands, (cudaStream_t)stream);
}
