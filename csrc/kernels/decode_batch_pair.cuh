// decode_batch_pair.cuh -- what the linear layers of a decode batch that have few rows write: of a token,
// pairs of eight columns. Two halves of RoPE's pairs of a head for q, k and v, which go to q and to the
// cache; and any two runs of the residual stream for O and down.

#pragma once
#include "decode_batch.cuh"

enum PairOutput { kQkvOutput, kResidualOutput };

// Of the heads of q, k and v side by side: in which matrix, and which there.
struct HeadPlace {
    int matrix, head;
};

struct PairArguments {
    PairOutput output;
    bf16 *out;  // q, or the residual
    int out_columns;
    const BatchHeader *header;
    // From here for q, k and v alone.
    int num_heads;
    KvLayer cache;
    const bf16 *rope_table;

    __device__ __forceinline__ HeadPlace head_place(int head) const {
        int key = head - num_heads, value = key - cache.num_kv_heads;
        return value >= 0 ? HeadPlace{2, value} : key >= 0 ? HeadPlace{1, key} : HeadPlace{0, head};
    }
};

static inline PairArguments qkv_pairs(const BatchStep &step, const DecodeLayer &layer) {
    return {
        kQkvOutput,  step.buffers.q,         layer.q_proj.rows, step.buffers.header, step.problem.num_heads,
        layer.cache, step.problem.rope_table};
}
// Whether what head_pair reads is there before the kernel before q, k and v has ended. In the first layer that
// one writes the header. Later on, gate and up had ended when down let the norm start, and with them the
// first layer's kernels.
static inline bool may_qkv_look_ahead(const BatchStep &step, const DecodeLayer &layer) {
    return &layer != step.problem.layers;
}
static inline PairArguments residual_pairs(const BatchStep &step, const Matrix &weight) {
    return {kResidualOutput, step.buffers.residual, weight.rows, step.buffers.header, 0, {}, nullptr};
}

// Where a thread writes a pair, and what it needs for that, asked for before the products: nobody waits for
// it after them.
struct Pair {
    bf16 *low, *high;     // null: nothing
    uint4 first, second;  // of the residual, or cosines and sines
};

// Past the L1 cache: read before the kernel before this one has ended, where others write it by turns.
static __device__ __forceinline__ Pair residual_pair(const PairArguments &args, int token, int low_column,
                                                     int high_column) {
    bf16 *low = args.out + (size_t)token * args.out_columns + low_column,
         *high = low + high_column - low_column;
    return {low, high, __ldcg(reinterpret_cast<const uint4 *>(low)),
            __ldcg(reinterpret_cast<const uint4 *>(high))};
}

// Of a head: columns 8 chunk .. and those half a head on.
static __device__ __forceinline__ Pair head_pair(const PairArguments &args, int token, int head,
                                                 int chunk) {
    constexpr int kHalf = kTileCols / 2;
    int position = args.header->lengths[token] - 1;
    const bf16 *row = args.rope_table + (size_t)position * kTileCols + chunk * kVector;
    Pair pair = {nullptr, nullptr, load_vector(row), load_vector(row + kHalf)};
    HeadPlace place = args.head_place(head);
    if (place.matrix == 0) {
        pair.low = args.out + (size_t)token * args.out_columns + head * kTileCols + chunk * kVector;
        pair.high = pair.low + kHalf;
        return pair;
    }
    int block_size = args.cache.block_size, index = position / block_size;
    int offset = position - index * block_size;
    int block = args.header->block_tables[(size_t)token * args.header->max_blocks_per_seq + index];
    bf16 *tile = args.cache.data + kv_tile_offset(block, place.head, args.cache.num_kv_heads, block_size);
    if (place.matrix == 2) tile += (size_t)block_size * kTileCols;
    pair.low = tile + tile_offset(offset, chunk);
    pair.high = tile + tile_offset(offset, chunk + kHalf / kVector);
    return pair;
}

// The pair from the rounded outputs.
static __device__ __forceinline__ void write_pair(const PairArguments &args, int head, const Pair &pair,
                                                  uint4 low, uint4 high) {
    float a[kVector], b[kVector], x[kVector], y[kVector];
    unpack(a, low), unpack(b, high);
    unpack(x, pair.first), unpack(y, pair.second);
    if (args.output == kResidualOutput) {
#pragma unroll
        for (int j = 0; j < kVector; ++j) x[j] = __fadd_rn(x[j], a[j]), y[j] = __fadd_rn(y[j], b[j]);
        low = pack(x), high = pack(y);
    } else if (args.head_place(head).matrix < 2) {  // a query or a key: rotated
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
