// rope_table.c -- cos and sin of every position and pair, once per model, on the host.
//
//   angle[p, i] = p * f_i,  f_i = theta^(-2i/head_dim), llama3 scaling bends the low frequencies
//
// Shapes    table [max_positions, head_dim] bf16: cos of the head_dim/2 pairs, then their sin
// Rounding  pow, cos and sin in float64 and rounded once to float32, so that no C library's float32 ones
//           enter the bits; everything between in float32 as transformers computes it; to bf16 at the end
// Source    transformers modeling_rope_utils.py (default and llama3); docs/numerics.md section 6
// See       tests/model/test_rope_table.py

#include <math.h>
#include "model.h"

static float llama3_scaled(float frequency, const EngineModelConfig *config) {
    float factor = (float)config->rope_factor;
    float low = (float)config->rope_low_freq_factor;
    float high = (float)config->rope_high_freq_factor;
    float original = (float)config->rope_original_max_position_embeddings;
    float wavelength =
        (1.0f / frequency) * (float)(2.0 * 3.14159265358979323846);  // a reciprocal, then a product
    if (wavelength > (float)((double)original / config->rope_low_freq_factor)) return frequency / factor;
    if (wavelength < (float)((double)original / config->rope_high_freq_factor)) return frequency;
    float smooth = ((1.0f / wavelength) * original - low) / (high - low);
    return (1.0f - smooth) * frequency / factor + smooth * frequency;
}

Status rope_table_fill(bf16 *table, const EngineModelConfig *config, int max_positions) {
    int half = config->head_dim / 2;
    for (int i = 0; i < half; i++) {
        float exponent = (float)(2 * i) / (float)config->head_dim;
        float frequency = 1.0f / (float)pow((double)(float)config->rope_theta, (double)exponent);
        if (config->rope_type == ROPE_LLAMA3) frequency = llama3_scaled(frequency, config);
        for (int position = 0; position < max_positions; position++) {
            double angle = (double)((float)position * frequency);
            table[(size_t)position * config->head_dim + i] = bf16_from_float((float)cos(angle));
            table[(size_t)position * config->head_dim + half + i] = bf16_from_float((float)sin(angle));
        }
    }
    return STATUS_OK;
}
