// prefill.c -- a decoder layer for many tokens, through the backend's fused operations.
//
// The same bits as forward.c, operation by operation; where taps want the values in between, that runs.
//
// See       kernels/qkv_linear.cu, gated_linear.cu, linear_add.cu, tests/system/test_fused_prefill.py

#include "model.h"

int prefill_applies(const Model *model, const BatchIndex *batch) {
    const Kernels *k = model->kernels;
    return k->fused_min_tokens && batch->num_tokens >= k->fused_min_tokens();
}

Status prefill_layer(Model *model, int layer, const BatchIndex *batch) {
    const EngineModelConfig *c = &model->config;
    const Kernels *k = model->kernels;
    const LayerWeights *w = &model->weights.layers[layer];
    const KvLayer *cache = &model->cache[layer];
    Activations *a = &model->activations;
    Stream stream = model->stream;
    int num_tokens = batch->num_tokens;

    TRY(k->rms_norm(a->normed, a->residual, w->input_layernorm, num_tokens, c->hidden_size, c->rms_norm_eps,
                    stream));
    TRY(k->qkv_linear(a->q, cache, a->normed, &w->q_proj, &w->k_proj, &w->v_proj, model->weights.rope_table,
                      batch->positions, batch->slot_mapping, num_tokens, stream));
    TRY(k->attention(a->attn, a->q, cache, batch, c->num_heads, stream));
    TRY(k->linear_add(a->residual, a->attn, &w->o_proj, a->residual, num_tokens, stream));
    TRY(k->rms_norm(a->normed, a->residual, w->post_attention_layernorm, num_tokens, c->hidden_size,
                    c->rms_norm_eps, stream));
    TRY(k->gated_linear(a->act, a->normed, &w->gate_proj, &w->up_proj, num_tokens, stream));
    return k->linear_add(a->residual, a->act, &w->down_proj, a->residual, num_tokens, stream);
}
