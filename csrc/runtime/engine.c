// engine.c -- an engine's life: allocate everything, run steps, free everything.

#include <stdlib.h>
#include <string.h>
#include "engine_state.h"

Status allocate(Engine *e, void *pointer_to_pointer, size_t bytes, int64_t *account) {
    void *memory;
    TRY(e->model.kernels->alloc(&memory, bytes, e->model.stream));
    e->allocations[e->num_allocations++] = memory;
    memcpy(pointer_to_pointer, &memory, sizeof memory);
    *account += (int64_t)bytes;
    return STATUS_OK;
}

static Status allocate_host(void *pointer_to_pointer, size_t bytes) {
    void *memory = calloc(1, bytes);
    if (!memory) return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of host memory", bytes);
    memcpy(pointer_to_pointer, &memory, sizeof memory);
    return STATUS_OK;
}

static size_t larger(size_t a, size_t b) {
    return a > b ? a : b;
}

// Values in one allocation lie there one after another, and none is alive with one in its place: attention's
// values are dead when the MLP begins, gate when act takes its place, up when down is computed, all of them
// when the logits are.
static Status allocate_activations(Engine *e) {
    const EngineModelConfig *c = &e->model.config;
    Activations *a = &e->model.activations;
    size_t tokens = (size_t)e->options.max_num_tokens;
    size_t hidden = tokens * c->hidden_size;  // values, as all of these
    size_t heads = tokens * c->num_heads * c->head_dim;
    size_t kv_heads = tokens * c->num_kv_heads * c->head_dim;
    size_t intermediate = tokens * c->intermediate_size;
    // Before the MLP the wanted rows of q lie in act's place: where heads are wider than the MLP and tokens
    // few, they would reach into q itself.
    size_t gate = larger(intermediate, (size_t)MAX_WANTED * c->num_heads * c->head_dim);
    size_t layer = gate + larger(2 * heads + 2 * kv_heads + hidden, intermediate);
    int64_t *account = &e->workspace_bytes;
    int rows = e->options.max_num_seqs > 16 ? e->options.max_num_seqs : 16;
    a->logits_rows = rows < e->options.max_num_tokens ? rows : e->options.max_num_tokens;
    size_t logits_bytes = (size_t)a->logits_rows * c->vocab_size * sizeof(float);
    TRY(allocate(e, &a->residual, hidden * sizeof(bf16), account));
    TRY(allocate(e, &a->normed, hidden * sizeof(bf16), account));
    TRY(allocate(e, &a->gate, larger(layer * sizeof(bf16), logits_bytes), account));
    a->act = a->gate;
    a->up = a->gate + gate;
    a->q = a->up;
    a->attn = a->q + heads;
    a->k = a->attn + heads;
    a->v = a->k + kv_heads;
    a->projected = a->v + kv_heads;
    a->logits = (float *)a->gate;
    size_t ids = (size_t)a->logits_rows + (size_t)GREEDY_STEPS * e->options.max_num_seqs;
    return allocate(e, &a->next_ids, ids * sizeof(int32_t), account);
}

static Status allocate_sampling(Engine *e) {
    SamplingRoom *room = &e->model.sampling;
    int vocab_size = e->model.config.vocab_size;
    SamplingSizes sizes = sampling_sizes(e->model.activations.logits_rows, vocab_size);
    room->max_edits = sizes.max_edits;
    TRY(allocate_host(&e->edited_by, (size_t)vocab_size));
    TRY(allocate_host(&room->host_staged, sizes.staged));
    TRY(allocate_host(&room->host_scores, sizes.scores));
    TRY(allocate(e, &room->staged, sizes.staged, &e->workspace_bytes));
    TRY(allocate(e, &room->saved, sizes.saved, &e->workspace_bytes));
    TRY(allocate(e, &room->scores, sizes.scores, &e->workspace_bytes));
    // Scores come back whole, also what no row has asked for yet.
    return e->model.kernels->copy_in(room->scores, room->host_scores, sizes.scores, e->model.stream);
}

static Status allocate_cache(Engine *e) {
    const EngineModelConfig *c = &e->model.config;
    const EngineOptions *o = &e->options;
    size_t layer_values = (size_t)o->num_blocks * c->num_kv_heads * 2 * o->block_size * c->head_dim;
    TRY(allocate(e, &e->kv_pool, layer_values * sizeof(bf16) * c->num_layers, &e->kv_bytes));
    TRY(allocate_host(&e->model.cache, sizeof(KvLayer) * c->num_layers));
    for (int layer = 0; layer < c->num_layers; layer++)
        e->model.cache[layer] = (KvLayer){e->kv_pool + layer_values * layer, o->num_blocks, o->block_size,
                                          c->num_kv_heads, c->head_dim};
    return allocate_host(&e->slot_owner, sizeof(uint32_t) * o->num_blocks * o->block_size);
}

static Status allocate_weights(Engine *e) {
    Model *m = &e->model;
    TRY(allocate_host(&m->weights.layers, sizeof(LayerWeights) * m->config.num_layers));
    e->num_slots = weight_slots_count(&m->config);
    TRY(allocate_host(&e->slots, sizeof(WeightSlot) * e->num_slots));
    weight_slots_fill(e->slots, m);
    for (int i = 0; i < e->num_slots; i++) {
        WeightSlot *slot = &e->slots[i];
        size_t bytes =
            slot->matrix ? m->kernels->packed_bytes(slot->rows, slot->cols) : slot->cols * sizeof(bf16);
        void **memory = slot->matrix ? &slot->matrix->data : (void **)slot->vector;
        TRY(m->kernels->alloc(memory, bytes, m->stream));
        e->weight_bytes += (int64_t)bytes;
    }
    if (m->config.tie_word_embeddings) m->weights.lm_head = m->weights.embed_tokens;
    return STATUS_OK;
}

static Status build_rope_table(Engine *e) {
    size_t bytes = (size_t)e->options.max_seq_len * e->model.config.head_dim * sizeof(bf16);
    bf16 *host = malloc(bytes);
    if (!host) return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of host memory for the rope table", bytes);
    Status status = allocate(e, &e->model.weights.rope_table, bytes, &e->workspace_bytes);
    if (status == STATUS_OK) status = rope_table_fill(host, &e->model.config, e->options.max_seq_len);
    if (status == STATUS_OK)
        status = e->model.kernels->copy_in(e->model.weights.rope_table, host, bytes, e->model.stream);
    if (status == STATUS_OK) status = e->model.kernels->synchronize(e->model.stream);
    free(host);
    return status;
}

static Status build(Engine *e) {
    const EngineOptions *o = &e->options;
    if (o->device == DEVICE_CUDA)
        TRY(cuda_kernels(&e->model.kernels));
    else
        e->model.kernels = twin_kernels();
    TRY(e->model.kernels->open_stream(&e->model.stream, o->num_threads));
    TRY(allocate_weights(e));
    TRY(allocate_activations(e));
    TRY(allocate_sampling(e));
    TRY(allocate_cache(e));
    TRY(build_rope_table(e));
    e->index_count = index_values(o);
    TRY(allocate_host(&e->greedy_arrays, 4 * sizeof(int32_t) * o->max_num_seqs));
    TRY(allocate_host(&e->index_host, e->index_count * sizeof(int32_t)));
    return allocate(e, &e->index_device, e->index_count * sizeof(int32_t), &e->workspace_bytes);
}

Status engine_create(const EngineModelConfig *config, const EngineOptions *options, Engine **engine) {
    if (!config || !options || !engine)
        return fail(STATUS_INVALID_ARGUMENT, "config, options or engine is null");
    *engine = NULL;
    TRY(check_config(config));
    TRY(check_options(options));
    Engine *e = NULL;
    TRY(allocate_host(&e, sizeof *e));
    e->model.config = *config;
    e->options = *options;
    e->limits = (BatchLimits){config->vocab_size,   options->block_size,     options->num_blocks,
                              options->max_seq_len, options->max_num_tokens, options->max_num_seqs};
    Status status = build(e);
    if (status != STATUS_OK) {
        engine_destroy(e);
        return status;
    }
    *engine = e;
    return STATUS_OK;
}

Status engine_destroy(Engine *e) {
    if (!e) return STATUS_OK;
    const Kernels *k = e->model.kernels;
    if (e->decode_graphs) k->close_decode_graphs(e->decode_graphs);
    if (k && e->model.stream) {
        for (int i = 0; e->slots && i < e->num_slots; i++)
            k->free(e->slots[i].matrix ? e->slots[i].matrix->data : *e->slots[i].vector, e->model.stream);
        for (int i = 0; i < e->num_allocations; i++) k->free(e->allocations[i], e->model.stream);
        k->close_stream(e->model.stream);
    }
    free(e->slots);
    free(e->index_host);
    free(e->slot_owner);
    free(e->edited_by);
    free(e->model.sampling.host_staged);
    free(e->model.sampling.host_scores);
    free(e->decode_layers);
    free(e->greedy_arrays);
    free(e->model.cache);
    free(e->model.weights.layers);
    free(e);
    return STATUS_OK;
}

static Status check_taps(const Engine *e, const EngineTap *taps, int num_taps) {
    if (num_taps < 0 || (num_taps > 0 && !taps))
        return fail(STATUS_INVALID_ARGUMENT, "num_taps is %d", num_taps);
    for (int i = 0; i < num_taps; i++) {
        int in_layer = taps[i].point > TAP_EMBED && taps[i].point < TAP_FINAL_NORM;
        if (taps[i].point < 0 || taps[i].point >= NUM_TAP_POINTS)
            return fail(STATUS_INVALID_ARGUMENT, "taps[%d].point is %d, must be 0 .. %d", i, taps[i].point,
                        NUM_TAP_POINTS - 1);
        if (taps[i].layer < 0 || taps[i].layer >= (in_layer ? e->model.config.num_layers : 1))
            return fail(STATUS_INVALID_ARGUMENT, "taps[%d].layer is %d, must be 0 .. %d", i, taps[i].layer,
                        in_layer ? e->model.config.num_layers - 1 : 0);
        if (taps[i].point == TAP_LOGITS && taps[i].force)
            return fail(STATUS_INVALID_ARGUMENT, "taps[%d].force: logits cannot be forced", i);
    }
    return STATUS_OK;
}

Status check_alive(const Engine *e) {
    if (!e) return fail(STATUS_INVALID_ARGUMENT, "engine is null");
    if (e->is_dead)
        return fail(STATUS_DEVICE_ERROR, "the device failed in an earlier call: this engine is dead");
    return STATUS_OK;
}

Status outcome(Engine *e, Status status) {
    if (status == STATUS_DEVICE_ERROR) e->is_dead = 1;
    if (status != STATUS_OK) e->model.chosen = (Chosen){.num_rows = 0};  // nobody waits for them now
    return status;
}

Status check_usable(const Engine *e) {
    TRY(check_alive(e));
    if (!e->is_ready)
        return fail(STATUS_INVALID_ARGUMENT, "engine_finish_loading was not called, or failed");
    if (e->is_stepping)
        return fail(STATUS_INVALID_ARGUMENT, "a step was begun: engine_forward_end comes first");
    return STATUS_OK;
}

static Status begin(Engine *e, const EngineBatch *batch, const EngineTap *taps, int num_taps) {
    if (!batch) return fail(STATUS_INVALID_ARGUMENT, "batch is null");
    TRY(check_usable(e));
    TRY(check_taps(e, taps, num_taps));
    TRY(batch_check(batch, &e->limits, 0, e->slot_owner, ++e->step));
    if (batch->sampling)
        TRY(sampling_check(batch->sampling, batch->num_logits, e->limits.vocab_size, e->edited_by));
    BatchIndex index;
    TapSet set = {taps, num_taps};
    Status status = index_of_batch(e, batch, &index);
    if (status == STATUS_OK)
        status = model_forward(&e->model, &index, &set, batch->sampling, batch->logits, batch->next_ids);
    e->is_stepping = status == STATUS_OK;
    return outcome(e, status);
}

Status engine_forward(Engine *e, const EngineBatch *batch, const EngineTap *taps, int32_t num_taps) {
    TRY(begin(e, batch, taps, num_taps));
    return engine_forward_end(e);
}

Status engine_forward_begin(Engine *e, const EngineBatch *batch) {
    return begin(e, batch, NULL, 0);
}

Status engine_forward_end(Engine *e) {
    TRY(check_alive(e));
    if (!e->is_stepping) return fail(STATUS_INVALID_ARGUMENT, "no step was begun");
    e->is_stepping = 0;
    return outcome(e, model_collect(&e->model));
}
