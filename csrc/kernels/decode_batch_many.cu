// decode_batch_many.cu -- the wide linear layers of a decode batch of more than 64 sequences: gate and up
// with SiLU, and the LM head with each token's best logit of a tile.
//
//   y[t, n] = sum over chunks of 512 k's, ascending, of the chunk's chain of k16 steps
//
// Shapes    x and act [num_seqs, columns] row by row; logits [num_seqs, vocab_size] float32
// Rounding  docs/numerics.md sections 2 and 7
// Mapping   linear_many.cuh, as prefill's layers
// Cost      2 flops per token, row and k, and 2 bytes per weight: near the balance of both
// See       decode_batch.cuh, twin/linear.c, tests/kernels/test_bits_decode_batch.py

#include "gate_sums.cuh"

#include "decode_batch.cuh"
#include "decode_candidate.cuh"

// Straight from the fragments, at a tile's end: where writing was spread over the next tile's products, they
// took longer than this takes.
struct LogitSums {
    static constexpr int kParts = 1;
    static constexpr int kUnits = 1;
    static constexpr int kLaneRows = kSums / 2;  // of one of a lane's two tokens
    using Fetched = Nothing;
    float *logits;  // [num_seqs, vocab_size]
    int vocab_size;
    int row_tiles;
    float *best_values;  // [num_seqs, row_tiles]
    int *best_ids;

    __device__ __forceinline__ PartPlace part(int row_tile, int) const {
        return {0, row_tile * kBlockRows};
    }
    // Where a lane's value i belongs, from its first row on.
    static __device__ __forceinline__ int row_of(int i) { return i / 2 * 8 + i % 2; }

    // A token's four lanes write 32 bytes at a time. `whole`: all rows exist, in pairs that are aligned.
    __device__ __forceinline__ void store(const float (&values)[kLaneRows], int token, int first_row,
                                          bool whole) const {
        float *to = logits + (size_t)token * vocab_size + first_row;
#pragma unroll
        for (int i = 0; i < kLaneRows; i += 2) {
            int row = row_of(i);
            if (whole) {
                *reinterpret_cast<float2 *>(to + row) = make_float2(values[i], values[i + 1]);
            } else {
                if (first_row + row < vocab_size) to[row] = values[i];
                if (first_row + row + 1 < vocab_size) to[row + 1] = values[i + 1];
            }
        }
    }

    __device__ __forceinline__ Candidate best_of(float (&values)[kLaneRows], int first_row,
                                                 bool whole) const {
        if (!whole) {
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i)
                if (first_row + row_of(i) >= vocab_size) values[i] = __int_as_float(0xff800000);
        }
        float largest = values[0];
#pragma unroll
        for (int i = 1; i < kLaneRows; ++i) largest = max_or_nan(largest, values[i]);
        Candidate best = {largest, 0};
        bool is_nan = largest != largest;
#pragma unroll
        for (int i = kLaneRows - 1; i >= 0; --i)  // the first that is the largest
            if (is_nan ? values[i] != values[i] : values[i] == largest) best.id = first_row + row_of(i);
#pragma unroll
        for (int offset = 1; offset < 4; offset *= 2) {
            float other = __shfl_xor_sync(kFullWarp, best.value, offset);
            int other_id = __shfl_xor_sync(kFullWarp, best.id, offset);
            best.take_better(other, other_id);
        }
        return best;
    }

    __device__ __forceinline__ bool take(const float (&sum)[kSums], const WarpTile &tile) const {
        int first_row = tile.row_tile * kBlockRows + 2 * (tile.lane % 4);
        bool whole = (tile.row_tile + 1) * kBlockRows <= vocab_size && vocab_size % 2 == 0;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            int token = tile.first_token + tile.lane / 4 + 8 * half;
            float values[kLaneRows];
#pragma unroll
            for (int i = 0; i < kLaneRows; ++i) values[i] = sum[i / 2 * 4 + 2 * half + i % 2];
            if (token < tile.num_tokens) store(values, token, first_row, whole);
            Candidate best = best_of(values, first_row, whole);
            if (tile.lane % 4 > 0 || token >= tile.num_tokens) continue;
            best_values[(size_t)token * row_tiles + tile.row_tile] = best.value;
            best_ids[(size_t)token * row_tiles + tile.row_tile] = best.id;
        }
        return false;
    }

    __device__ __forceinline__ Fetched fetch(int, const WarpTile &) const { return {}; }
    __device__ __forceinline__ void write(int, const WarpTile &, const Fetched &) const {}
};

template <typename Operation>
static Status launch_counted(const BatchStep &step, const Operation &operation,
                             const ManyOperands &operands, cudaStream_t stream) {
    ManyMaps maps = {};
    ManyTiles tiles;
    int num_multiprocessors;
    TRY(prepare_many(&maps, &tiles, &num_multiprocessors, operands, Operation::kParts));
    tiles.counted = &step.buffers.header->num_seqs;
    return launch_tiles(operation, maps, tiles, num_multiprocessors, stream);
}

Status launch_batch_gate_up_many(const BatchStep &step, const DecodeLayer &layer, cudaStream_t stream) {
    ManyOperands operands = {step.buffers.normed, step.bucket, {&layer.gate_proj, &layer.up_proj}, 2};
    return launch_counted(step, GateSums{step.buffers.act, layer.gate_proj.rows}, operands, stream);
}

Status launch_batch_head_many(const BatchStep &step, cudaStream_t stream) {
    const Matrix &head = step.problem.lm_head;
    ManyOperands operands = {step.buffers.normed, step.bucket, {&head}, 1};
    LogitSums logits = {step.problem.logits, head.rows, (head.rows + kBlockRows - 1) / kBlockRows,
                        step.buffers.best_values, step.buffers.best_ids};
    return launch_counted(step, logits, operands, stream);
}
