// rotary_embedding.c -- turn each pair (i, i + head_dim/2) of a head by its token's angle.
//
//   out[i]       = bf16(bf16(x[i] cos_i) - bf16(x[i + d/2] sin_i))
//   out[i + d/2] = bf16(bf16(x[i + d/2] cos_i) + bf16(x[i] sin_i))
//
// Shapes    x, out [num_tokens, num_heads, head_dim]; table [max_positions, head_dim] = cos | sin; all bf16
// Rounding  each product and the sum to bf16, as transformers does in bf16
// Source    transformers apply_rotary_pos_emb; Su et al., arXiv:2104.09864; docs/numerics.md section 6
// See       model/rope_table.c, kernels/rotary_embedding.cu, tests/twin/test_rotary_embedding.py

#include "../kernels/kernels.h"

static float product(bf16 x, bf16 y) {
    return bf16_to_float(bf16_from_float(bf16_to_float(x) * bf16_to_float(y)));
}

Status twin_rotary_embedding(bf16 *out, const bf16 *x, const bf16 *table, const int32_t *positions,
                             int num_tokens, int num_heads, int head_dim, Stream stream) {
    (void)stream;
    int half = head_dim / 2;
    for (int token = 0; token < num_tokens; token++) {
        const bf16 *cos = table + (size_t)positions[token] * head_dim;
        const bf16 *sin = cos + half;
        for (int head = 0; head < num_heads; head++) {
            size_t base = ((size_t)token * num_heads + head) * head_dim;
            for (int i = 0; i < half; i++) {
                bf16 first = x[base + i], second = x[base + half + i];
                out[base + i] = bf16_from_float(product(first, cos[i]) - product(second, sin[i]));
                out[base + half + i] = bf16_from_float(product(second, cos[i]) + product(first, sin[i]));
            }
        }
    }
    return STATUS_OK;
}
