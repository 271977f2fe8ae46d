// count_mlp_rows.c -- no fault: the twin's table with an activation that counts the values it is given.

#include "../../../csrc/kernels/kernels.h"

const Kernels *__real_twin_kernels(void);

static int num_values;

// Values of silu_and_mul since the last call.
__attribute__((visibility("default"))) int count_mlp_values(void) {
    int count = num_values;
    num_values = 0;
    return count;
}

static Status counting_silu_and_mul(bf16 *out, const bf16 *gate, const bf16 *up, int64_t count,
                                    Stream stream) {
    num_values += (int)count;
    return __real_twin_kernels()->silu_and_mul(out, gate, up, count, stream);
}

const Kernels *__wrap_twin_kernels(void) {
    static Kernels table;
    table = *__real_twin_kernels();
    table.silu_and_mul = counting_silu_and_mul;
    return &table;
}
