// greedy.c -- several greedy steps in one call: on the backend's fused step, or forward pass by pass.

#include <stdlib.h>
#include <string.h>
#include "engine_state.h"

Status prepare_decode(Engine *e) {
    Model *m = &e->model;
    const EngineModelConfig *c = &m->config;
    const Weights *w = &m->weights;
    const Activations *a = &m->activations;
    if (!m->kernels->decode_step) return STATUS_OK;
    int max_num_seqs = e->options.max_num_seqs, max_num_tokens = e->options.max_num_tokens;
    DecodeProblem problem = {
        .num_layers = c->num_layers,
        .hidden_size = c->hidden_size,
        .intermediate_size = c->intermediate_size,
        .num_heads = c->num_heads,
        .num_kv_heads = c->num_kv_heads,
        .max_seq_len = e->options.max_seq_len,
        .max_num_seqs = max_num_seqs < max_num_tokens ? max_num_seqs : max_num_tokens,
        .eps = c->rms_norm_eps,
        .embed_tokens = w->embed_tokens,
        .lm_head = w->lm_head,
        .norm = w->norm,
        .rope_table = w->rope_table,
        .residual = a->residual,
        .q = a->q,
        .k = a->k,
        .v = a->v,
        .attn = a->attn,
        .act = a->act,
        .logits = a->logits,
        .next_ids = a->next_ids,
    };
    size_t bytes = 0;
    TRY(m->kernels->decode_workspace_bytes(&bytes, &problem));
    if (bytes == 0) return STATUS_OK;
    // Once, though a call that failed is repeated.
    if (!e->decode_workspace) TRY(allocate(e, &e->decode_workspace, bytes, &e->workspace_bytes));
    if (!e->decode_layers) e->decode_layers = calloc((size_t)c->num_layers, sizeof *e->decode_layers);
    problem.workspace = e->decode_workspace;
    void *zeros = calloc(1, bytes);
    if (!zeros || !e->decode_layers) {
        free(zeros);
        return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of host memory", bytes);
    }
    Status status = m->kernels->copy_in(problem.workspace, zeros, bytes, m->stream);
    if (status == STATUS_OK) status = m->kernels->synchronize(m->stream);
    free(zeros);
    for (int i = 0; i < c->num_layers; i++) {
        const LayerWeights *layer = &w->layers[i];
        e->decode_layers[i] = (DecodeLayer){layer->input_layernorm, layer->post_attention_layernorm,
                                            layer->q_proj,          layer->k_proj,
                                            layer->v_proj,          layer->o_proj,
                                            layer->gate_proj,       layer->up_proj,
                                            layer->down_proj,       m->cache[i]};
    }
    problem.layers = e->decode_layers;
    if (status == STATUS_OK && !e->decode_graphs && !e->options.enforce_eager)
        status = m->kernels->open_decode_graphs(&e->decode_graphs);
    problem.graphs = e->decode_graphs;
    if (status == STATUS_OK) m->decode = problem;
    return status;
}

// The next step's arrays from this one's: in place, on the host.
static void advance(const Engine *e, const EngineBatch *b, int32_t *arrays, const int32_t *ids) {
    int n = b->num_seqs;
    int32_t *input_ids = arrays, *positions = arrays + n, *slots = arrays + 2 * n,
            *seq_lens = arrays + 3 * n;
    for (int i = 0; i < n; i++) {
        input_ids[i] = ids[i];
        int position = ++positions[i];
        seq_lens[i]++;
        int block = b->block_tables[(size_t)i * b->max_blocks_per_seq + position / e->options.block_size];
        slots[i] = block * e->options.block_size + position % e->options.block_size;
    }
}

static Status decode_one_by_one(Engine *e, const EngineBatch *batch, int num_steps, int32_t *next_ids) {
    size_t n = (size_t)batch->num_seqs;
    int32_t *arrays = e->greedy_arrays;
    memcpy(arrays, batch->input_ids, n * sizeof *arrays);
    memcpy(arrays + n, batch->positions, n * sizeof *arrays);
    memcpy(arrays + 2 * n, batch->slot_mapping, n * sizeof *arrays);
    memcpy(arrays + 3 * n, batch->seq_lens, n * sizeof *arrays);
    EngineBatch step = *batch;
    step.input_ids = arrays;
    step.positions = arrays + n;
    step.slot_mapping = arrays + 2 * n;
    step.seq_lens = arrays + 3 * n;
    Status status = STATUS_OK;
    for (int i = 0; i < num_steps && status == STATUS_OK; i++) {
        BatchIndex index;
        TapSet no_taps = {NULL, 0};
        if (i > 0) advance(e, batch, arrays, next_ids + (size_t)(i - 1) * n);
        status = index_of_batch(e, &step, &index);
        if (status == STATUS_OK)
            status = model_forward(&e->model, &index, &no_taps, NULL,
                                   i == num_steps - 1 ? batch->logits : NULL, next_ids + (size_t)i * n);
        if (status == STATUS_OK) status = model_collect(&e->model);
    }
    return status;
}

static Status decode_fused(Engine *e, const BatchIndex *index, int num_steps, float *logits,
                           int32_t *next_ids) {
    for (int done = 0; done < num_steps; done += GREEDY_STEPS) {
        int steps = num_steps - done < GREEDY_STEPS ? num_steps - done : GREEDY_STEPS;
        TRY(decode_forward(&e->model, index, done, steps, NULL, logits,
                           next_ids + (size_t)done * index->num_seqs));
        TRY(model_collect(&e->model));
    }
    return STATUS_OK;
}

Status engine_decode(Engine *e, const EngineBatch *batch, int32_t num_steps, int32_t *next_ids) {
    if (!batch || !next_ids) return fail(STATUS_INVALID_ARGUMENT, "batch or next_ids is null");
    TRY(check_usable(e));
    if (num_steps < 1 || num_steps > e->limits.max_seq_len)
        return fail(STATUS_INVALID_ARGUMENT, "num_steps is %d, must be 1 .. %d (max_seq_len)", num_steps,
                    e->limits.max_seq_len);
    TRY(batch_check(batch, &e->limits, num_steps - 1, e->slot_owner, ++e->step));
    if (batch->num_tokens != batch->num_seqs || batch->num_logits != batch->num_seqs)
        return fail(STATUS_INVALID_ARGUMENT,
                    "num_tokens is %d and num_logits %d, both must be %d (num_seqs)", batch->num_tokens,
                    batch->num_logits, batch->num_seqs);
    if (batch->sampling)
        return fail(STATUS_INVALID_ARGUMENT, "sampling is not null, but these steps are greedy");
    BatchIndex index;
    Status status = index_of_batch(e, batch, &index);
    if (status == STATUS_OK)
        status = decode_applies(&e->model, &index)
                     ? decode_fused(e, &index, num_steps, batch->logits, next_ids)
                     : decode_one_by_one(e, batch, num_steps, next_ids);
    return outcome(e, status);
}
