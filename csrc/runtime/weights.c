// weights.c -- the checkpoint's names, to the letter, and the shape each must have.

#include "weights.h"

#include <stdio.h>

int weight_slots_count(const EngineModelConfig *config) {
    return 2 + 9 * config->num_layers + (config->tie_word_embeddings ? 0 : 1);
}

static WeightSlot *add(WeightSlot *slot, const char *prefix, const char *name, int rows, int cols,
                       Matrix *matrix, bf16 **vector) {
    *slot = (WeightSlot){.rows = rows, .cols = cols, .matrix = matrix, .vector = vector};
    snprintf(slot->name, sizeof slot->name, "%s%s.weight", prefix, name);
    if (matrix) *matrix = (Matrix){.rows = rows, .cols = cols};
    return slot + 1;
}

void weight_slots_fill(WeightSlot *slot, Model *model) {
    const EngineModelConfig *c = &model->config;
    Weights *w = &model->weights;
    int q_size = c->num_heads * c->head_dim, kv_size = c->num_kv_heads * c->head_dim;
    slot = add(slot, "model.", "embed_tokens", c->vocab_size, c->hidden_size, &w->embed_tokens, NULL);
    for (int i = 0; i < c->num_layers; i++) {
        LayerWeights *layer = &w->layers[i];
        char prefix[32];
        snprintf(prefix, sizeof prefix, "model.layers.%d.", i);
        slot = add(slot, prefix, "input_layernorm", 1, c->hidden_size, NULL, &layer->input_layernorm);
        slot = add(slot, prefix, "self_attn.q_proj", q_size, c->hidden_size, &layer->q_proj, NULL);
        slot = add(slot, prefix, "self_attn.k_proj", kv_size, c->hidden_size, &layer->k_proj, NULL);
        slot = add(slot, prefix, "self_attn.v_proj", kv_size, c->hidden_size, &layer->v_proj, NULL);
        slot = add(slot, prefix, "self_attn.o_proj", c->hidden_size, q_size, &layer->o_proj, NULL);
        slot = add(slot, prefix, "post_attention_layernorm", 1, c->hidden_size, NULL,
                   &layer->post_attention_layernorm);
        slot = add(slot, prefix, "mlp.gate_proj", c->intermediate_size, c->hidden_size, &layer->gate_proj,
                   NULL);
        slot =
            add(slot, prefix, "mlp.up_proj", c->intermediate_size, c->hidden_size, &layer->up_proj, NULL);
        slot = add(slot, prefix, "mlp.down_proj", c->hidden_size, c->intermediate_size, &layer->down_proj,
                   NULL);
    }
    slot = add(slot, "model.", "norm", 1, c->hidden_size, NULL, &w->norm);
    if (!c->tie_word_embeddings) add(slot, "", "lm_head", c->vocab_size, c->hidden_size, &w->lm_head, NULL);
}
