// wrong_rms_norm.c -- RMSNorm as most first attempts have it: one rounding, at the very end.
//
//   cc -O2 -shared -fPIC -o wrong.so wrong_rms_norm.c -lm

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static float widen(uint16_t bits) {
    uint32_t wide = (uint32_t)bits << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

static uint16_t round_to_bf16(float value) {  // to nearest, ties to even
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// x, out [num_tokens, hidden_size], weight [hidden_size]: bf16. The context is null here.
int op_rms_norm(void *context, uint16_t *out, const uint16_t *x, const uint16_t *weight,
                int32_t num_tokens, int32_t hidden_size, float eps) {
    (void)context;
    for (int token = 0; token < num_tokens; token++) {
        const uint16_t *row = x + (size_t)token * hidden_size;
        double sum = 0;
        for (int h = 0; h < hidden_size; h++) {
            sum += (double)widen(row[h]) * widen(row[h]);
        }
        double scale = 1.0 / sqrt(sum / hidden_size + eps);
        for (int h = 0; h < hidden_size; h++) {
            float normed = (float)(widen(row[h]) * scale);
            out[(size_t)token * hidden_size + h] = round_to_bf16(normed * widen(weight[h]));
        }
    }
    return 0;
}
