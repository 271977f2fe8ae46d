// linear_add.cu -- a linear layer for many tokens, added to the residual stream.
//
//   out[t, n] = bf16(residual[t, n] + bf16(sum_k x[t, k] weight[n, k]))
//
// Shapes    x [num_tokens, in_features] bf16, in_features a multiple of 64; weight packed; residual, out
//           [num_tokens, out_features], out_features a multiple of 8; out may be residual
// Rounding  those of linear.cu and residual_add.cu, one after the other
// Mapping   linear_many.cuh; a warp adds its 16 tokens' rows 16 bytes at a time
// Cost      2 flops per token, row and k: bound by the tensor cores
// See       linear.cu, residual_add.cu, tests/system/test_fused_prefill.py

#include "linear_many.cuh"

struct AddSums {
    static constexpr int kParts = 1;
    bf16 *out;
    const bf16 *residual;
    int rows;

    __device__ __forceinline__ PartPlace part(int row_tile, int) const {
        return {0, row_tile * kBlockRows};
    }

    __device__ __forceinline__ void finish(const float (&sum)[kSums], const WarpTile &tile) const {
        stage_sums(sum, tile);
        take_staged<kBlockRows>(tile, [&](int token_row, int chunk, uint4 staged) {
            int token = tile.first_token + token_row,
                row = tile.row_tile * kBlockRows + chunk * kChunkValues;
            if (token >= tile.num_tokens || row >= rows) return;
            size_t at = (size_t)token * rows + row;
            float x[kVector], y[kVector];
            unpack(x, load_vector(residual + at));
            unpack(y, staged);
#pragma unroll
            for (int i = 0; i < kVector; ++i) x[i] = __fadd_rn(x[i], y[i]);
            store_vector(out + at, pack(x));
        });
    }
};

extern "C" Status cuda_linear_add(bf16 *out, const bf16 *x, const Matrix *weight, const bf16 *residual,
                                  int num_tokens, Stream stream) {
    if (num_tokens == 0) return STATUS_OK;
    ManyOperands operands = {x, num_tokens, {weight}, 1};
    return launch_many(AddSums{out, residual, weight->rows}, operands, (cudaStream_t)stream);
}
