// silu_and_mul.c -- the gated activation of the MLP.
//
//   out = bf16(bf16(gate / (1 + exp(-gate))) * up)
//
// Shapes    gate, up, out [num_values] bf16
// Rounding  the sigmoid in float32; to bf16 after SiLU and after the product, as transformers does
// Source    transformers LlamaMLP.forward; Shazeer, arXiv:2002.05202; docs/numerics.md section 7
// See       kernels/silu_and_mul.cu, tests/twin/test_silu_and_mul.py

#include "exp2.h"
#include "../kernels/kernels.h"

Status twin_silu_and_mul(bf16 *out, const bf16 *gate, const bf16 *up, int64_t num_values, Stream stream) {
    (void)stream;
    const float log2_e = numerics_constant(LOG2_E);
    for (int64_t i = 0; i < num_values; i++) {
        float g = bf16_to_float(gate[i]);
        float silu = g / (1.0f + contract_exp2(-g * log2_e));
        out[i] = bf16_from_float(bf16_to_float(bf16_from_float(silu)) * bf16_to_float(up[i]));
    }
    return STATUS_OK;
}

Status twin_exp2(float *out, const float *x, int64_t n, Stream stream) {
    (void)stream;
    for (int64_t i = 0; i < n; i++) out[i] = contract_exp2(x[i]);
    return STATUS_OK;
}
