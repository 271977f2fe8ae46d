// inspect.c -- looking into an engine: tap shapes, cache contents, memory; and poisoning, for tests.

#include "engine_state.h"

Status engine_tap_shape(Engine *e, int32_t point, int32_t *width, int32_t *value_size) {
    if (!e || !width || !value_size)
        return fail(STATUS_INVALID_ARGUMENT, "engine, width or value_size is null");
    if (point < 0 || point >= NUM_TAP_POINTS)
        return fail(STATUS_INVALID_ARGUMENT, "point is %d, must be 0 .. %d", point, NUM_TAP_POINTS - 1);
    *width = tap_width(&e->model.config, (TapPoint)point);
    *value_size = tap_value_size((TapPoint)point);
    return STATUS_OK;
}

Status engine_read_kv(Engine *e, int32_t layer, const int32_t *slots, int32_t num_slots, void *k, void *v) {
    if (!e || !slots || !k || !v) return fail(STATUS_INVALID_ARGUMENT, "engine, slots, k or v is null");
    TRY(check_alive(e));
    if (layer < 0 || layer >= e->model.config.num_layers)
        return fail(STATUS_INVALID_ARGUMENT, "layer is %d, must be 0 .. %d", layer,
                    e->model.config.num_layers - 1);
    if (num_slots < 0)
        return fail(STATUS_INVALID_ARGUMENT, "num_slots is %d, must be at least 0", num_slots);
    int all_slots = e->options.num_blocks * e->options.block_size;
    for (int i = 0; i < num_slots; i++)
        if (slots[i] < 0 || slots[i] >= all_slots)
            return fail(STATUS_INVALID_ARGUMENT, "slots[%d] is %d, must be 0 .. %d", i, slots[i],
                        all_slots - 1);
    const Kernels *kernels = e->model.kernels;
    return outcome(e,
                   kernels->read_kv_cache(k, v, &e->model.cache[layer], slots, num_slots, e->model.stream));
}

Status engine_fill_blocks(Engine *e, const int32_t *block_ids, int32_t num_block_ids, uint16_t value) {
    if (!e || !block_ids) return fail(STATUS_INVALID_ARGUMENT, "engine or block_ids is null");
    TRY(check_alive(e));
    if (num_block_ids < 0)
        return fail(STATUS_INVALID_ARGUMENT, "num_block_ids is %d, must be at least 0", num_block_ids);
    for (int i = 0; i < num_block_ids; i++)
        if (block_ids[i] < 0 || block_ids[i] >= e->options.num_blocks)
            return fail(STATUS_INVALID_ARGUMENT, "block_ids[%d] is %d, must be 0 .. %d", i, block_ids[i],
                        e->options.num_blocks - 1);
    for (int i = 0; i < num_block_ids; i++)
        for (int layer = 0; layer < e->model.config.num_layers; layer++)
            TRY(outcome(e, e->model.kernels->fill_block(&e->model.cache[layer], block_ids[i], value,
                                                        e->model.stream)));
    return outcome(e, e->model.kernels->synchronize(e->model.stream));
}

Status engine_free_memory(Engine *e, int64_t *bytes) {
    if (!e || !bytes) return fail(STATUS_INVALID_ARGUMENT, "engine or bytes is null");
    return e->model.kernels->free_memory(bytes, e->model.stream);
}

Status engine_memory(Engine *e, int64_t *weights, int64_t *kv_cache, int64_t *workspace) {
    if (!e || !weights || !kv_cache || !workspace)
        return fail(STATUS_INVALID_ARGUMENT, "an argument is null");
    *weights = e->weight_bytes;
    *kv_cache = e->kv_bytes;
    *workspace = e->workspace_bytes;
    return STATUS_OK;
}
