// forward.c -- the Llama decoder on one page: one call per operation, a tap after each.
//
// Source    transformers modeling_llama.py; Touvron et al., arXiv:2302.13971
// See       prefill.c, decode.c, docs/architecture.md, verification/taps.py

#include "model.h"

// A tap on the whole step's rows.
static Status tap(const Model *model, const TapSet *taps, TapPoint point, int layer, void *value,
                  const BatchIndex *batch) {
    return tap_rows(model, taps, point, layer, value, 0, batch->num_tokens);
}

// A layer's q, rotated; its keys and values go to the cache.
static Status query_key_value(Model *model, int layer, const BatchIndex *batch, const TapSet *taps) {
    const EngineModelConfig *c = &model->config;
    const Kernels *k = model->kernels;
    const LayerWeights *w = &model->weights.layers[layer];
    Activations *a = &model->activations;
    Stream stream = model->stream;
    int num_tokens = batch->num_tokens;

    TRY(k->rms_norm(a->normed, a->residual, w->input_layernorm, num_tokens, c->hidden_size, c->rms_norm_eps,
                    stream));
    TRY(tap(model, taps, TAP_ATTN_NORM, layer, a->normed, batch));
    if (prefill_applies(model, batch, taps)) return prefill_query_key_value(model, layer, batch);
    TRY(k->linear(a->q, a->normed, &w->q_proj, num_tokens, stream));
    TRY(tap(model, taps, TAP_Q, layer, a->q, batch));
    TRY(k->linear(a->k, a->normed, &w->k_proj, num_tokens, stream));
    TRY(tap(model, taps, TAP_K, layer, a->k, batch));
    TRY(k->linear(a->v, a->normed, &w->v_proj, num_tokens, stream));
    TRY(tap(model, taps, TAP_V, layer, a->v, batch));
    TRY(k->rotary_embedding(a->q, a->q, model->weights.rope_table, batch->positions, num_tokens,
                            c->num_heads, c->head_dim, stream));
    TRY(tap(model, taps, TAP_Q_ROPE, layer, a->q, batch));
    TRY(k->rotary_embedding(a->k, a->k, model->weights.rope_table, batch->positions, num_tokens,
                            c->num_kv_heads, c->head_dim, stream));
    TRY(tap(model, taps, TAP_K_ROPE, layer, a->k, batch));
    return k->write_kv_cache(&model->cache[layer], a->k, a->v, batch->slot_mapping, num_tokens, stream);
}

static Status attention_block(Model *model, int layer, const bf16 *q, const BatchIndex *batch,
                              const TapSet *taps) {
    const EngineModelConfig *c = &model->config;
    const Kernels *k = model->kernels;
    const LayerWeights *w = &model->weights.layers[layer];
    Activations *a = &model->activations;
    Stream stream = model->stream;
    int num_tokens = batch->num_tokens;

    TRY(k->attention(a->attn, q, &model->cache[layer], batch, c->num_heads, stream));
    TRY(tap(model, taps, TAP_ATTN, layer, a->attn, batch));
    if (prefill_applies(model, batch, taps)) return prefill_output(model, layer, batch);
    TRY(k->linear(a->projected, a->attn, &w->o_proj, num_tokens, stream));
    TRY(tap(model, taps, TAP_O, layer, a->projected, batch));
    TRY(k->residual_add(a->residual, a->residual, a->projected, (int64_t)num_tokens * c->hidden_size,
                        stream));
    return tap(model, taps, TAP_ATTN_RESIDUAL, layer, a->residual, batch);
}

static Status mlp_block(Model *model, int layer, const BatchIndex *batch, const TapSet *taps) {
    const EngineModelConfig *c = &model->config;
    const Kernels *k = model->kernels;
    const LayerWeights *w = &model->weights.layers[layer];
    Activations *a = &model->activations;
    Stream stream = model->stream;
    int num_tokens = batch->num_tokens;

    TRY(k->rms_norm(a->normed, a->residual, w->post_attention_layernorm, num_tokens, c->hidden_size,
                    c->rms_norm_eps, stream));
    TRY(tap(model, taps, TAP_MLP_NORM, layer, a->normed, batch));
    if (prefill_applies(model, batch, taps)) return prefill_mlp(model, layer, batch);
    TRY(k->linear(a->gate, a->normed, &w->gate_proj, num_tokens, stream));
    TRY(tap(model, taps, TAP_GATE, layer, a->gate, batch));
    TRY(k->linear(a->up, a->normed, &w->up_proj, num_tokens, stream));
    TRY(tap(model, taps, TAP_UP, layer, a->up, batch));
    TRY(k->silu_and_mul(a->act, a->gate, a->up, (int64_t)num_tokens * c->intermediate_size, stream));
    TRY(tap(model, taps, TAP_ACT, layer, a->act, batch));
    TRY(k->linear(a->projected, a->act, &w->down_proj, num_tokens, stream));
    TRY(tap(model, taps, TAP_DOWN, layer, a->projected, batch));
    TRY(k->residual_add(a->residual, a->residual, a->projected, (int64_t)num_tokens * c->hidden_size,
                        stream));
    return tap(model, taps, TAP_MLP_RESIDUAL, layer, a->residual, batch);
}

// From here on only the wanted rows: those of the residual stream move to its start, those of q to where
// the MLP works later.
static Status keep_wanted_rows(Model *model, const BatchIndex *batch, const bf16 **q) {
    const EngineModelConfig *c = &model->config;
    const Kernels *k = model->kernels;
    Activations *a = &model->activations;
    Stream stream = model->stream;
    int rows = batch->num_logits;

    TRY(k->gather_rows(a->projected, a->residual, batch->logits_indices, rows, c->hidden_size, stream));
    TRY(k->gather_rows(a->residual, a->projected, batch->wanted->logits_indices, rows, c->hidden_size,
                       stream));
    *q = a->act;
    return k->gather_rows(a->act, a->q, batch->logits_indices, rows, c->num_heads * c->head_dim, stream);
}

// Final norm and logits of the wanted rows, a slice of rows at a time so that the buffer stays small.
static Status output_block(Model *model, const BatchIndex *batch, const TapSet *taps,
                           const EngineSampling *sampling, float *logits, int32_t *next_ids) {
    const EngineModelConfig *c = &model->config;
    const Kernels *k = model->kernels;
    Activations *a = &model->activations;
    Stream stream = model->stream;

    TRY(k->gather_rows(a->projected, a->residual, batch->logits_indices, batch->num_logits, c->hidden_size,
                       stream));
    TRY(k->rms_norm(a->normed, a->projected, model->weights.norm, batch->num_logits, c->hidden_size,
                    c->rms_norm_eps, stream));
    TRY(tap_rows(model, taps, TAP_FINAL_NORM, 0, a->normed, 0, batch->num_logits));
    for (int first = 0; first < batch->num_logits; first += a->logits_rows) {
        int num_rows =
            batch->num_logits - first < a->logits_rows ? batch->num_logits - first : a->logits_rows;
        TRY(k->linear_f32(a->logits, a->normed + (size_t)first * c->hidden_size, &model->weights.lm_head,
                          num_rows, stream));
        TRY(tap_rows(model, taps, TAP_LOGITS, 0, a->logits, first, num_rows));
        if (logits)
            TRY(k->copy_out(logits + (size_t)first * c->vocab_size, a->logits,
                            (size_t)num_rows * c->vocab_size * sizeof(float), stream));
        TRY(model_choose(model, sampling, first, num_rows, next_ids ? next_ids + first : NULL));
    }
    return STATUS_OK;
}

Status model_forward(Model *model, const BatchIndex *batch, const TapSet *taps,
                     const EngineSampling *sampling, float *logits, int32_t *next_ids) {
    Activations *a = &model->activations;
    if (taps->num_taps == 0 && decode_applies(model, batch))
        return decode_forward(model, batch, 0, 1, sampling, logits, next_ids);
    TRY(model->kernels->embedding(a->residual, &model->weights.embed_tokens, batch->input_ids,
                                  batch->num_tokens, model->stream));
    TRY(tap(model, taps, TAP_EMBED, 0, a->residual, batch));
    const BatchIndex *rows = batch;  // whose residual stream goes on
    for (int layer = 0, last = model->config.num_layers - 1; layer <= last; layer++) {
        const bf16 *q = a->q;
        TRY(query_key_value(model, layer, batch, taps));
        if (layer == last && batch->wanted && taps->num_taps == 0) {
            rows = batch->wanted;
            if (rows->num_tokens == 0) return STATUS_OK;  // keys and values were all that was wanted
            TRY(keep_wanted_rows(model, batch, &q));
        }
        TRY(attention_block(model, layer, q, rows, taps));
        TRY(mlp_block(model, layer, rows, taps));
    }
    return output_block(model, rows, taps, sampling, logits, next_ids);
}
