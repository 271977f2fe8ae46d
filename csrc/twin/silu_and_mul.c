// silu_and_mul.c -- the gated activation of the MLP.
//
//   out = bf16(bf16(gate / (1 + exp(-gate))) * up)
//
// Shapes    gate, up, out [num_values] bf16
// Rounding  the sigmoid in float32; to bf16 after SiLU and after the product, as transformers does
// Source    transformers LlamaMLP.forward; Shazeer, arXiv:2002.05202; docs/numerics.md section 7
// See       kernels/silu_and_mul.cu, tests/twin/test_silu_and_mul.py

#include "exp2.h"
#include "threads.h"

enum { TASK_VALUES = 16384 };

typedef struct SiluArguments {
    bf16 *out;
    const bf16 *gate;
    const bf16 *up;
    int64_t num_values;
} SiluArguments;

FMA_CLONES static void silu_and_mul_task(const void *arguments, int64_t index, void *scratch) {
    (void)scratch;
    const SiluArguments *args = arguments;
    const float log2_e = numerics_constant(LOG2_E);
    int64_t first = index * TASK_VALUES;
    int64_t end = first + TASK_VALUES < args->num_values ? first + TASK_VALUES : args->num_values;
    for (int64_t i = first; i < end; i++) {
        float g = bf16_to_float(args->gate[i]);
        float silu = g / (1.0f + contract_exp2(-g * log2_e));
        float rounded = bf16_to_float(bf16_from_float(silu));
        args->out[i] = bf16_from_float(rounded * bf16_to_float(args->up[i]));
    }
}

Status twin_silu_and_mul(bf16 *out, const bf16 *gate, const bf16 *up, int64_t num_values, Stream stream) {
    SiluArguments arguments = {out, gate, up, num_values};
    parallel_for(stream, (num_values + TASK_VALUES - 1) / TASK_VALUES, silu_and_mul_task, &arguments);
    return STATUS_OK;
}

Status twin_exp2(float *out, const float *x, int64_t n, Stream stream) {
    (void)stream;
    for (int64_t i = 0; i < n; i++) out[i] = contract_exp2(x[i]);
    return STATUS_OK;
}
