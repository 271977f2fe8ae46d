// residual_add.c -- the residual stream takes up an operator's output.
//
//   out = bf16(x + y)
//
// Shapes    x, y, out [num_values] bf16; out may be x or y
// Rounding  the exact sum to bf16 (two bf16 values add in float32 without a second rounding that matters)
// Source    transformers LlamaDecoderLayer.forward
// See       kernels/residual_add.cu, tests/twin/test_residual_add.py

#include "../kernels/kernels.h"

Status twin_residual_add(bf16 *out, const bf16 *x, const bf16 *y, int64_t num_values, Stream stream) {
    (void)stream;
    for (int64_t i = 0; i < num_values; i++)
        out[i] = bf16_from_float(bf16_to_float(x[i]) + bf16_to_float(y[i]));
    return STATUS_OK;
}
