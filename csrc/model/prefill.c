// prefill.c -- the parts of a decoder layer that the backend fuses for many tokens.
//
// The same bits as forward.c's, operation by operation; where taps want the values in between, those run.
//
// See       kernels/qkv_linear.cu, gated_linear.cu, linear_add.cu, tests/system/test_fused_prefill.py

#include "model.h"

int prefill_applies(const Model *model, const BatchIndex *batch, const TapSet *taps) {
    const Kernels *k = model->kernels;
    if (taps->num_taps > 0 || !k->fused_min_tokens) return 0;
    int are_wanted_rows = !batch->slot_mapping;  // of a larger step: fewer launches, at memory speed
    return are_wanted_rows || batch->num_tokens >= k->fused_min_tokens();
}

Status prefill_query_key_value(Model *model, int layer, const BatchIndex *batch) {
    const LayerWeights *w = &model->weights.layers[layer];
    Activations *a = &model->activations;
    return model->kernels->qkv_linear(a->q, &model->cache[layer], a->normed, &w->q_proj, &w->k_proj,
                                      &w->v_proj, model->weights.rope_table, batch->positions,
                                      batch->slot_mapping, batch->num_tokens, model->stream);
}

Status prefill_output(Model *model, int layer, const BatchIndex *batch) {
    Activations *a = &model->activations;
    return model->kernels->linear_add(a->residual, a->attn, &model->weights.layers[layer].o_proj,
                                      a->residual, batch->num_tokens, model->stream);
}

Status prefill_mlp(Model *model, int layer, const BatchIndex *batch) {
    const Kernels *k = model->kernels;
    const LayerWeights *w = &model->weights.layers[layer];
    Activations *a = &model->activations;
    TRY(k->gated_linear(a->act, a->normed, &w->gate_proj, &w->up_proj, batch->num_tokens, model->stream));
    return k->linear_add(a->residual, a->act, &w->down_proj, a->residual, batch->num_tokens, model->stream);
}
