// ops.c -- implements ops.h, but for ops_sampling.c: each operation alone, host memory in and out, on
// either backend.

#include "../include/ops.h"

#include <limits.h>
#include <stdlib.h>
#include "../common/numerics.h"
#include "batch.h"
#include "op_context.h"

Status op_context_create(int32_t device, int32_t num_threads, OpContext **context) {
    if (!context) return fail(STATUS_INVALID_ARGUMENT, "context is null");
    *context = NULL;
    if (device != DEVICE_CPU && device != DEVICE_CUDA)
        return fail(STATUS_INVALID_ARGUMENT, "device is %d, must be 0 (cpu) or 1 (cuda)", device);
    if (num_threads < 0 || num_threads > 1024)
        return fail(STATUS_INVALID_ARGUMENT, "num_threads is %d, must be 0 .. 1024", num_threads);
    OpContext created = {.kernels = twin_kernels()};
    if (device == DEVICE_CUDA) TRY(cuda_kernels(&created.kernels));
    TRY(created.kernels->open_stream(&created.stream, num_threads));
    *context = malloc(sizeof **context);
    if (!*context) {
        created.kernels->close_stream(created.stream);
        return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of host memory", sizeof **context);
    }
    **context = created;
    return STATUS_OK;
}

Status op_context_destroy(OpContext *context) {
    if (context) context->kernels->close_stream(context->stream);
    free(context);
    return STATUS_OK;
}

Status op_embedding(OpContext *context, uint16_t *out, const uint16_t *table, const int32_t *ids,
                    int32_t num_tokens, int32_t vocab_size, int32_t hidden_size) {
    TRY(check_pointers(context, out, table, ids));
    TRY(check_positive("num_tokens", num_tokens));
    TRY(check_positive("vocab_size", vocab_size));
    TRY(check_positive("hidden_size", hidden_size));
    for (int i = 0; i < num_tokens; i++)
        if (ids[i] < 0 || ids[i] >= vocab_size)
            return fail(STATUS_INVALID_ARGUMENT, "ids[%d] is %d, must be 0 .. %d", i, ids[i],
                        vocab_size - 1);
    SCOPED_BUFFERS(b, context);
    Matrix matrix;
    int32_t *device_ids;
    bf16 *result;
    size_t bytes = (size_t)num_tokens * hidden_size * sizeof(bf16);
    TRY(input_matrix(&b, &matrix, table, vocab_size, hidden_size));
    TRY(input(&b, &device_ids, ids, num_tokens * sizeof(int32_t)));
    TRY(output(&b, &result, bytes));
    TRY(context->kernels->embedding(result, &matrix, device_ids, num_tokens, context->stream));
    return fetch(&b, out, result, bytes);
}

Status op_rms_norm(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *weight,
                   int32_t num_tokens, int32_t hidden_size, float eps) {
    TRY(check_pointers(context, out, x, weight));
    TRY(check_positive("num_tokens", num_tokens));
    TRY(check_positive("hidden_size", hidden_size));
    SCOPED_BUFFERS(b, context);
    bf16 *device_x, *device_weight, *result;
    size_t bytes = (size_t)num_tokens * hidden_size * sizeof(bf16);
    TRY(input(&b, &device_x, x, bytes));
    TRY(input(&b, &device_weight, weight, hidden_size * sizeof(bf16)));
    TRY(output(&b, &result, bytes));
    TRY(context->kernels->rms_norm(result, device_x, device_weight, num_tokens, hidden_size, eps,
                                   context->stream));
    return fetch(&b, out, result, bytes);
}

static Status linear(OpContext *context, void *out, int out_is_float32, const uint16_t *x,
                     const uint16_t *weight, int num_tokens, int out_features, int in_features) {
    TRY(check_pointers(context, out, x, weight));
    TRY(check_positive("num_tokens", num_tokens));
    TRY(check_positive("out_features", out_features));
    TRY(check_positive("in_features", in_features));
    if (in_features % NUMERICS_STEP)
        return fail(STATUS_INVALID_ARGUMENT, "in_features is %d, must be a multiple of %d", in_features,
                    NUMERICS_STEP);
    SCOPED_BUFFERS(b, context);
    Matrix matrix;
    bf16 *device_x;
    void *result;
    size_t bytes = (size_t)num_tokens * out_features * (out_is_float32 ? sizeof(float) : sizeof(bf16));
    TRY(input_matrix(&b, &matrix, weight, out_features, in_features));
    TRY(input(&b, &device_x, x, (size_t)num_tokens * in_features * sizeof(bf16)));
    TRY(output(&b, &result, bytes));
    if (out_is_float32)
        TRY(context->kernels->linear_f32(result, device_x, &matrix, num_tokens, context->stream));
    else
        TRY(context->kernels->linear(result, device_x, &matrix, num_tokens, context->stream));
    return fetch(&b, out, result, bytes);
}

Status op_linear(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *weight,
                 int32_t num_tokens, int32_t out_features, int32_t in_features) {
    return linear(context, out, 0, x, weight, num_tokens, out_features, in_features);
}

Status op_linear_f32(OpContext *context, float *out, const uint16_t *x, const uint16_t *weight,
                     int32_t num_tokens, int32_t out_features, int32_t in_features) {
    return linear(context, out, 1, x, weight, num_tokens, out_features, in_features);
}

// What both fused linear layers ask for, which only some backends have.
static Status check_fused(const void *fused, int32_t num_tokens, int32_t out_features,
                          int32_t in_features) {
    TRY(check_positive("num_tokens", num_tokens));
    TRY(check_positive("out_features", out_features));
    TRY(check_positive("in_features", in_features));
    if (out_features % 8)
        return fail(STATUS_INVALID_ARGUMENT, "out_features is %d, must be a multiple of 8", out_features);
    if (in_features % 64)
        return fail(STATUS_INVALID_ARGUMENT, "in_features is %d, must be a multiple of 64", in_features);
    if (!fused) return fail(STATUS_UNAVAILABLE, "this device has no fused operations");
    return STATUS_OK;
}

Status op_linear_add(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *weight,
                     const uint16_t *residual, int32_t num_tokens, int32_t out_features,
                     int32_t in_features) {
    TRY(check_pointers(context, out, x, weight));
    TRY(check_pointers(context, out, x, residual));
    TRY(check_fused((const void *)context->kernels->linear_add, num_tokens, out_features, in_features));
    SCOPED_BUFFERS(b, context);
    Matrix matrix;
    bf16 *device_x, *result;
    size_t bytes = (size_t)num_tokens * out_features * sizeof(bf16);
    TRY(input(&b, &device_x, x, (size_t)num_tokens * in_features * sizeof(bf16)));
    TRY(input_matrix(&b, &matrix, weight, out_features, in_features));
    TRY(input(&b, &result, residual, bytes));  // in place, as the model does it
    TRY(context->kernels->linear_add(result, device_x, &matrix, result, num_tokens, context->stream));
    return fetch(&b, out, result, bytes);
}

Status op_gated_linear(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *gate,
                       const uint16_t *up, int32_t num_tokens, int32_t out_features, int32_t in_features) {
    TRY(check_pointers(context, out, x, gate));
    TRY(check_pointers(context, out, x, up));
    TRY(check_fused((const void *)context->kernels->gated_linear, num_tokens, out_features, in_features));
    SCOPED_BUFFERS(b, context);
    Matrix gate_matrix, up_matrix;
    bf16 *device_x, *result;
    size_t bytes = (size_t)num_tokens * out_features * sizeof(bf16);
    TRY(input(&b, &device_x, x, (size_t)num_tokens * in_features * sizeof(bf16)));
    TRY(input_matrix(&b, &gate_matrix, gate, out_features, in_features));
    TRY(input_matrix(&b, &up_matrix, up, out_features, in_features));
    TRY(output(&b, &result, bytes));
    TRY(context->kernels->gated_linear(result, device_x, &gate_matrix, &up_matrix, num_tokens,
                                       context->stream));
    return fetch(&b, out, result, bytes);
}

Status op_rope_table(OpContext *context, uint16_t *table, const EngineModelConfig *config,
                     int32_t max_positions) {
    TRY(check_pointers(context, table, config, config));
    TRY(check_positive("max_positions", max_positions));
    return rope_table_fill(table, config, max_positions);
}

Status op_rotary_embedding(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *table,
                           const int32_t *positions, int32_t num_tokens, int32_t num_heads,
                           int32_t head_dim, int32_t max_positions) {
    TRY(check_pointers(context, out, x, table));
    TRY(check_pointers(context, out, x, positions));
    TRY(check_positive("num_tokens", num_tokens));
    TRY(check_positive("num_heads", num_heads));
    if (head_dim != 64) return fail(STATUS_INVALID_ARGUMENT, "head_dim is %d, must be 64", head_dim);
    for (int i = 0; i < num_tokens; i++)
        if (positions[i] < 0 || positions[i] >= max_positions)
            return fail(STATUS_INVALID_ARGUMENT, "positions[%d] is %d, must be 0 .. %d", i, positions[i],
                        max_positions - 1);
    SCOPED_BUFFERS(b, context);
    bf16 *device_x, *device_table, *result;
    int32_t *device_positions;
    size_t bytes = (size_t)num_tokens * num_heads * head_dim * sizeof(bf16);
    TRY(input(&b, &device_x, x, bytes));
    TRY(input(&b, &device_table, table, (size_t)max_positions * head_dim * sizeof(bf16)));
    TRY(input(&b, &device_positions, positions, num_tokens * sizeof(int32_t)));
    TRY(output(&b, &result, bytes));
    TRY(context->kernels->rotary_embedding(result, device_x, device_table, device_positions, num_tokens,
                                           num_heads, head_dim, context->stream));
    return fetch(&b, out, result, bytes);
}

// The batch's index arrays in backend memory; input_ids and logits are not attention's business.
static Status input_batch(Buffers *buffers, BatchIndex *index, const EngineBatch *batch) {
    *index = (BatchIndex){.num_tokens = batch->num_tokens,
                          .num_seqs = batch->num_seqs,
                          .max_blocks_per_seq = batch->max_blocks_per_seq};
    for (int i = 0; i < batch->num_seqs; i++) {
        int seq_len_q = batch->cu_seqlens_q[i + 1] - batch->cu_seqlens_q[i];
        if (seq_len_q > index->max_seq_len_q) index->max_seq_len_q = seq_len_q;
        if (batch->seq_lens[i] > index->max_seq_len) index->max_seq_len = batch->seq_lens[i];
    }
    size_t value = sizeof(int32_t), seqs = (size_t)batch->num_seqs;
    TRY(input(buffers, &index->positions, batch->positions, batch->num_tokens * value));
    TRY(input(buffers, &index->slot_mapping, batch->slot_mapping, batch->num_tokens * value));
    TRY(input(buffers, &index->cu_seqlens_q, batch->cu_seqlens_q, (seqs + 1) * value));
    TRY(input(buffers, &index->seq_lens, batch->seq_lens, seqs * value));
    TRY(input(buffers, &index->block_tables, batch->block_tables,
              seqs * batch->max_blocks_per_seq * value));
    int32_t *prefill_seqs = calloc(seqs, value);
    if (!prefill_seqs) return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of host memory", seqs * value);
    index->num_prefill_seqs = batch_prefill_seqs(batch, prefill_seqs);
    Status status = input(buffers, &index->prefill_seqs, prefill_seqs, seqs * value);
    free(prefill_seqs);
    return status;
}

// A cache whose every slot holds k and v: the identity slot mapping writes them.
static Status input_cache(Buffers *buffers, KvLayer *cache, const bf16 *k, const bf16 *v) {
    int num_slots = cache->num_blocks * cache->block_size;
    size_t vectors = (size_t)num_slots * cache->num_kv_heads * cache->head_dim * sizeof(bf16);
    bf16 *device_k, *device_v;
    int32_t *device_slots;
    TRY(output(buffers, &cache->data, 2 * vectors));
    TRY(input(buffers, &device_k, k, vectors));
    TRY(input(buffers, &device_v, v, vectors));
    int32_t *slots = malloc(num_slots * sizeof(int32_t));
    if (!slots) return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of host memory", num_slots * sizeof(int32_t));
    for (int i = 0; i < num_slots; i++) slots[i] = i;
    Status status = input(buffers, &device_slots, slots, num_slots * sizeof(int32_t));
    if (status == STATUS_OK) status = buffers->context->kernels->synchronize(buffers->context->stream);
    free(slots);
    TRY(status);
    return buffers->context->kernels->write_kv_cache(cache, device_k, device_v, device_slots, num_slots,
                                                     buffers->context->stream);
}

Status op_attention(OpContext *context, uint16_t *out, const uint16_t *q, const uint16_t *k,
                    const uint16_t *v, const EngineBatch *batch, int32_t num_heads, int32_t num_kv_heads,
                    int32_t head_dim, int32_t block_size, int32_t num_blocks) {
    TRY(check_pointers(context, out, q, batch));
    TRY(check_pointers(context, out, k, v));
    if (head_dim != 64) return fail(STATUS_INVALID_ARGUMENT, "head_dim is %d, must be 64", head_dim);
    TRY(check_positive("num_kv_heads", num_kv_heads));
    if (num_heads < num_kv_heads || num_heads % num_kv_heads || num_heads / num_kv_heads > 32)
        return fail(STATUS_INVALID_ARGUMENT, "num_heads is %d, must be 1 .. 32 times num_kv_heads (%d)",
                    num_heads, num_kv_heads);
    if (block_size < 16 || NUMERICS_TILE % block_size)
        return fail(STATUS_INVALID_ARGUMENT, "block_size is %d, must be 16, 32, 64 or 128", block_size);
    if (num_blocks < 1 || num_blocks > INT_MAX / NUMERICS_TILE)
        return fail(STATUS_INVALID_ARGUMENT, "num_blocks is %d, must be 1 .. %d", num_blocks,
                    INT_MAX / NUMERICS_TILE);
    int32_t max_seq_len = num_blocks * block_size;
    BatchLimits limits = {1 << 30, block_size, num_blocks, max_seq_len, 1 << 30, 1 << 30};
    uint32_t *slot_owner = calloc((size_t)max_seq_len, sizeof *slot_owner);
    if (!slot_owner)
        return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of host memory", max_seq_len * sizeof *slot_owner);
    Status status = batch_check(batch, &limits, 0, slot_owner, 1);
    free(slot_owner);
    TRY(status);

    SCOPED_BUFFERS(b, context);
    KvLayer cache = {.num_blocks = num_blocks,
                     .block_size = block_size,
                     .num_kv_heads = num_kv_heads,
                     .head_dim = head_dim};
    BatchIndex index;
    bf16 *device_q, *result;
    size_t bytes = (size_t)batch->num_tokens * num_heads * head_dim * sizeof(bf16);
    TRY(input_cache(&b, &cache, k, v));
    TRY(input_batch(&b, &index, batch));
    TRY(input(&b, &device_q, q, bytes));
    TRY(output(&b, &result, bytes));
    TRY(context->kernels->attention(result, device_q, &cache, &index, num_heads, context->stream));
    return fetch(&b, out, result, bytes);
}

Status op_silu_and_mul(OpContext *context, uint16_t *out, const uint16_t *gate, const uint16_t *up,
                       int32_t num_tokens, int32_t intermediate_size) {
    TRY(check_pointers(context, out, gate, up));
    TRY(check_positive("num_tokens", num_tokens));
    TRY(check_positive("intermediate_size", intermediate_size));
    SCOPED_BUFFERS(b, context);
    bf16 *device_gate, *device_up, *result;
    int64_t num_values = (int64_t)num_tokens * intermediate_size;
    TRY(input(&b, &device_gate, gate, num_values * sizeof(bf16)));
    TRY(input(&b, &device_up, up, num_values * sizeof(bf16)));
    TRY(output(&b, &result, num_values * sizeof(bf16)));
    TRY(context->kernels->silu_and_mul(result, device_gate, device_up, num_values, context->stream));
    return fetch(&b, out, result, num_values * sizeof(bf16));
}

Status op_residual_add(OpContext *context, uint16_t *out, const uint16_t *x, const uint16_t *y,
                       int64_t num_values) {
    TRY(check_pointers(context, out, x, y));
    TRY(check_positive("num_values", num_values));
    SCOPED_BUFFERS(b, context);
    bf16 *device_x, *device_y, *result;
    TRY(input(&b, &device_x, x, num_values * sizeof(bf16)));
    TRY(input(&b, &device_y, y, num_values * sizeof(bf16)));
    TRY(output(&b, &result, num_values * sizeof(bf16)));
    TRY(context->kernels->residual_add(result, device_x, device_y, num_values, context->stream));
    return fetch(&b, out, result, num_values * sizeof(bf16));
}

Status op_argmax(OpContext *context, int32_t *ids, const float *logits, int32_t num_rows,
                 int32_t vocab_size) {
    TRY(check_pointers(context, ids, logits, logits));
    TRY(check_positive("num_rows", num_rows));
    TRY(check_positive("vocab_size", vocab_size));
    SCOPED_BUFFERS(b, context);
    float *device_logits;
    int32_t *result;
    TRY(input(&b, &device_logits, logits, (size_t)num_rows * vocab_size * sizeof(float)));
    TRY(output(&b, &result, num_rows * sizeof(int32_t)));
    TRY(context->kernels->argmax(result, device_logits, num_rows, vocab_size, context->stream));
    return fetch(&b, ids, result, num_rows * sizeof(int32_t));
}

Status op_tensor_core_step(OpContext *context, float *d, const float *c, const uint16_t *a,
                           const uint16_t *b_values, int64_t n) {
    TRY(check_pointers(context, d, c, a));
    TRY(check_pointers(context, d, c, b_values));
    TRY(check_positive("n", n));
    SCOPED_BUFFERS(b, context);
    float *device_c, *result;
    bf16 *device_a, *device_b;
    TRY(input(&b, &device_c, c, n * sizeof(float)));
    TRY(input(&b, &device_a, a, n * NUMERICS_STEP * sizeof(bf16)));
    TRY(input(&b, &device_b, b_values, n * NUMERICS_STEP * sizeof(bf16)));
    TRY(output(&b, &result, n * sizeof(float)));
    TRY(context->kernels->tensor_core_step(result, device_c, device_a, device_b, n, context->stream));
    return fetch(&b, d, result, n * sizeof(float));
}

Status op_exp2(OpContext *context, float *out, const float *x, int64_t n) {
    TRY(check_pointers(context, out, x, x));
    TRY(check_positive("n", n));
    SCOPED_BUFFERS(b, context);
    float *device_x, *result;
    TRY(input(&b, &device_x, x, n * sizeof(float)));
    TRY(output(&b, &result, n * sizeof(float)));
    TRY(context->kernels->exp2(result, device_x, n, context->stream));
    return fetch(&b, out, result, n * sizeof(float));
}
