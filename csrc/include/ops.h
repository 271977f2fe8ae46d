// ops.h -- each operation on its own, for tests, for benchmarks and for the curious.
//
// Same rules as engine.h. Pointers are host memory; results go to the first pointer. On DEVICE_CUDA each
// call copies in and out, so it is a test bench and not a fast path. bf16 values are uint16_t here.

#pragma once
#include "engine.h"
#pragma GCC visibility push(default)

// One operation's surroundings: a device, its threads or stream.
typedef struct OpContext OpContext;

Status op_context_create(int32_t device, int32_t num_threads, OpContext **context);
Status op_context_destroy(OpContext *context);  // null allowed

// out[t] = table[ids[t]]; table [vocab_size, hidden_size], out [num_tokens, hidden_size].
Status op_embedding(OpContext *context, uint16_t *out, const uint16_t *table, const int32_t *ids,
                    int32_t num_tokens, int32_t vocab_size, int32_t hidden_size);

// x, out [num_tokens, hidden_size], weight [hidden_size].
Status op_rms_norm(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *weight,
                   int32_t num_tokens, int32_t hidden_size, float eps);

// out = x Wt: x [num_tokens, in_features], weight [out_features, in_features], in_features multiple of 16.
Status op_linear(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *weight,
                 int32_t num_tokens, int32_t out_features, int32_t in_features);
// The same without the last rounding: float32 out, as for logits.
Status op_linear_f32(OpContext *context, float *out, const uint16_t *x, const uint16_t *weight,
                     int32_t num_tokens, int32_t out_features, int32_t in_features);

// Fused operations, which only DEVICE_CUDA has: to the bit what the operations they fuse give one after
// another. out = residual + linear(x, weight); residual, out [num_tokens, out_features]; in_features
// multiple of 64, out_features of 8.
Status op_linear_add(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *weight,
                     const uint16_t *residual, int32_t num_tokens, int32_t out_features,
                     int32_t in_features);
// out = silu_and_mul(linear(x, gate), linear(x, up)), the same multiples.
Status op_gated_linear(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *gate,
                       const uint16_t *up, int32_t num_tokens, int32_t out_features, int32_t in_features);

// The table of a model: [max_positions, head_dim] bf16, first half cos, second half sin.
Status op_rope_table(OpContext *context, uint16_t *table, const EngineModelConfig *config,
                     int32_t max_positions);
// x, out [num_tokens, num_heads, head_dim]; table as above, positions [num_tokens] below max_positions.
Status op_rotary_embedding(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *table,
                           const int32_t *positions, int32_t num_tokens, int32_t num_heads,
                           int32_t head_dim, int32_t max_positions);

// Causal attention of new tokens over a paged cache built from k and v by write_kv_cache:
// q, out [num_tokens, num_heads, head_dim]; k, v [num_slots, num_kv_heads, head_dim] indexed by slot;
// the rest as in EngineBatch. num_slots = num_blocks * block_size.
Status op_attention(OpContext *context, uint16_t *out, const uint16_t *q, const uint16_t *k,
                    const uint16_t *v, const EngineBatch *batch, int32_t num_heads, int32_t num_kv_heads,
                    int32_t head_dim, int32_t block_size, int32_t num_blocks);

// gate, up, out [num_tokens, intermediate_size].
Status op_silu_and_mul(OpContext *context, uint16_t *out, const uint16_t *gate, const uint16_t *up,
                       int32_t num_tokens, int32_t intermediate_size);

// x, y, out [num_values].
Status op_residual_add(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *y,
                       int64_t num_values);

// logits [num_rows, vocab_size] float32 -> ids [num_rows]; ties to the lowest id.
Status op_argmax(OpContext *context, int32_t *ids, const float *logits, int32_t num_rows,
                 int32_t vocab_size);

// The choice and score of each row's token, as engine_forward makes them. `uniforms` [num_rows] are the
// draws as fractions of 2^64, or null: those of the rows' seed, position and choice.
Status op_sample(OpContext *context, int32_t *ids, const float *logits, const EngineSampling *sampling,
                 const uint64_t *uniforms, int32_t num_rows, int32_t vocab_size);
// The logits [num_rows, vocab_size] after a sampling's edits.
Status op_edit_logits(OpContext *context, float *out, const float *logits, const EngineSampling *sampling,
                      int32_t num_rows, int32_t vocab_size);
// The draws of n (seed, position, choice).
Status op_uniform(OpContext *context, uint64_t *out, const uint64_t *seeds, const int32_t *positions,
                  const int32_t *choices, int64_t n);

// The k16 step for n independent outputs: d[i] = step(c[i], a[i, 0..15], b[i, 0..15]).
Status op_tensor_core_step(OpContext *context, float *d, const float *c, const uint16_t *a,
                           const uint16_t *b, int64_t n);

// The contract's exp2 of n values.
Status op_exp2(OpContext *context, float *out, const float *x, int64_t n);

#pragma GCC visibility pop
