// qkv_linear.cu -- attention's three linear layers for many tokens, rotated and written to the KV cache.
//
//   q[t] = rotate(x[t] Wqᵀ);  slot_mapping[t] of the cache: K = rotate(x[t] Wkᵀ), V = x[t] Wvᵀ
//
// Shapes    x [num_tokens, hidden_size] bf16, hidden_size a multiple of 64; q_proj, k_proj, v_proj packed;
//           q [num_tokens, num_heads, 64]; cache as in kv_cache.cu; rope table as in rotary_embedding.cu
// Rounding  those of linear.cu and rotary_embedding.cu, one after the other
// Mapping   linear_many.cuh; a tile is two heads of whichever matrix; a lane holds columns i and i + 32
// Cost      2 flops per token, row and k: bound by the tensor cores
// See       linear.cu, rotary_embedding.cu, kv_cache.cu, tests/system/test_fused_prefill.py

#include "../common/kv_tile.cuh"
#include "linear_many.cuh"

constexpr int kPairChunks = kChunksPerRow / 2;  // chunks of half a head

struct ProjectHeads {
    static constexpr int kParts = kBlockRows / kTileCols;
    static constexpr int kUnits = kWarpTokens * kParts * kPairChunks / kWarp;
    // Of one token and head: where in the cache, and eight columns of the table.
    struct Fetched {
        int slot;
        uint4 cosine;
        uint4 sine;
    };
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

    __device__ __forceinline__ bf16 *place_of(int token, int head, int slot, int chunk) const {
        if (head < num_heads)
            return q + ((size_t)token * num_heads + head) * kTileCols + chunk * kChunkValues;
        int kv_head = head - num_heads, offset = slot % cache.block_size;
        bool is_value = kv_head >= cache.num_kv_heads;
        if (is_value) kv_head -= cache.num_kv_heads;
        bf16 *tile = cache.data +
                     kv_tile_offset(slot / cache.block_size, kv_head, cache.num_kv_heads, cache.block_size);
        return tile + (is_value ? cache.block_size * kTileCols : 0) + tile_offset(offset, chunk);
    }

    __device__ __forceinline__ bool take(const float (&sum)[kSums], const WarpTile &tile) const {
        stage_sums(sum, tile);
        return true;
    }

    // What a lane writes in a unit: eight columns of the first half of a head and their partners of the
    // second.
    struct Place {
        int part, pair, place, token, head;

        __device__ __forceinline__ Place(int unit, const WarpTile &tile) {
            int index = unit * kWarp + tile.lane;
            pair = index % kPairChunks;
            part = index / kPairChunks % kParts;
            place = index / (kPairChunks * kParts);
            token = tile.first_token + place;
            head = tile.row_tile * kParts + part;
        }
    };

    __device__ __forceinline__ bool exists(const Place &place, const WarpTile &tile) const {
        return place.token < tile.num_tokens && place.head < num_heads + 2 * cache.num_kv_heads;
    }

    // V is not rotated.
    __device__ __forceinline__ bool rotates(int head) const {
        return head < num_heads + cache.num_kv_heads;
    }

    __device__ __forceinline__ Fetched fetch(int unit, const WarpTile &tile) const {
        Place place(unit, tile);
        Fetched fetched = {};
        if (!exists(place, tile)) return fetched;
        if (place.head >= num_heads) fetched.slot = slot_mapping[place.token];
        if (rotates(place.head)) {
            const bf16 *row =
                table + (size_t)positions[place.token] * kTileCols + place.pair * kChunkValues;
            fetched.cosine = load_vector(row);
            fetched.sine = load_vector(row + kTileCols / 2);
        }
        return fetched;
    }

    __device__ __forceinline__ void write(int unit, const WarpTile &tile, const Fetched &fetched) const {
        Place place(unit, tile);
        if (!exists(place, tile)) return;
        int first_chunk = place.part * kChunksPerRow + place.pair;
        uint4 first = *tile.staged(place.place, first_chunk);
        uint4 second = *tile.staged(place.place, first_chunk + kPairChunks);
        if (rotates(place.head)) rotate(first, second, fetched.cosine, fetched.sine);
        store_vector(place_of(place.token, place.head, fetched.slot, place.pair), first);
        store_vector(place_of(place.token, place.head, fetched.slot, kPairChunks + place.pair), second);
    }

    static __device__ __forceinline__ void rotate(uint4 &first, uint4 &second, uint4 cosine, uint4 sine) {
        float low[kVector], high[kVector], c[kVector], s[kVector];
        unpack(low, first);
        unpack(high, second);
        unpack(c, cosine);
        unpack(s, sine);
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
            float rotated = __fsub_rn(bf16_product(low[i], c[i]), bf16_product(high[i], s[i]));
            high[i] = __fadd_rn(bf16_product(high[i], c[i]), bf16_product(low[i], s[i]));
            low[i] = rotated;
        }
        first = pack(low);
        second = pack(high);
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
