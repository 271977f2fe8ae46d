// rms_norm.c -- scale each token's hidden vector to unit root mean square, then by a learned weight.
//
//   out[t, h] = bf16(weight[h] * bf16(x[t, h] / sqrt(mean_h(x[t, h]^2) + eps)))
//
// Shapes    x, out [num_tokens, hidden_size]; weight [hidden_size]; all bf16
// Rounding  statistics in float32 over a fixed tree; to bf16 before the weight, as transformers does
// Source    transformers LlamaRMSNorm.forward; Zhang & Sennrich, arXiv:1910.07467; numerics.md section 5
// See       kernels/rms_norm.cu, tests/twin/test_rms_norm.py

#include <math.h>
#include "../common/numerics.h"
#include "../kernels/kernels.h"

// The sum of squares over the contract's tree: 256 lanes of runs of eight, xor 16 .. 1, then 128 .. 32.
static float sum_of_squares(const bf16 *x, int hidden_size) {
    float lane[NUMERICS_NORM_LANES];
    const int block = NUMERICS_NORM_LANES * NUMERICS_NORM_RUN;
    for (int i = 0; i < NUMERICS_NORM_LANES; i++) {
        lane[i] = 0.0f;
        for (int base = i * NUMERICS_NORM_RUN; base < hidden_size; base += block) {
            int end = base + NUMERICS_NORM_RUN < hidden_size ? base + NUMERICS_NORM_RUN : hidden_size;
            for (int h = base; h < end; h++) {
                float value = bf16_to_float(x[h]);
                lane[i] += value * value;
            }
        }
    }
    static const int offsets[] = {16, 8, 4, 2, 1, 128, 64, 32};
    for (int level = 0; level < 8; level++) {
        float next[NUMERICS_NORM_LANES];
        for (int i = 0; i < NUMERICS_NORM_LANES; i++) next[i] = lane[i] + lane[i ^ offsets[level]];
        memcpy(lane, next, sizeof lane);
    }
    return lane[0];
}

Status twin_rms_norm(bf16 *out, const bf16 *x, const bf16 *weight, int num_tokens, int hidden_size,
                     float eps, Stream stream) {
    (void)stream;
    for (int token = 0; token < num_tokens; token++) {
        const bf16 *row = x + (size_t)token * hidden_size;
        float mean = sum_of_squares(row, hidden_size) / (float)hidden_size;
        float scale = 1.0f / sqrtf(mean + eps);
        for (int h = 0; h < hidden_size; h++) {
            float normalised = bf16_to_float(bf16_from_float(bf16_to_float(row[h]) * scale));
            out[(size_t)token * hidden_size + h] = bf16_from_float(bf16_to_float(weight[h]) * normalised);
        }
    }
    return STATUS_OK;
}
