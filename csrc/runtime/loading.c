// loading.c -- the checkpoint's tensors in and, bit for bit, out again.

#include <string.h>
#include "engine_state.h"

static Status find_slot(Engine *e, const char *name, int64_t rows, int64_t cols, WeightSlot **found) {
    if (!e || !name) return fail(STATUS_INVALID_ARGUMENT, "engine or name is null");
    TRY(check_alive(e));
    for (int i = 0; i < e->num_slots; i++) {
        WeightSlot *slot = &e->slots[i];
        if (strcmp(slot->name, name)) continue;
        if (rows != slot->rows || cols != slot->cols)
            return fail(STATUS_INVALID_ARGUMENT, "%s is [%lld, %lld], must be [%d, %d]", name,
                        (long long)rows, (long long)cols, slot->rows, slot->cols);
        *found = slot;
        return STATUS_OK;
    }
    return fail(STATUS_INVALID_ARGUMENT, "%.200s is not a tensor of this model", name);
}

// How many of some bf16 values are NaN or infinite. In blocks whose count fits 16 bits: then a compiler
// counts eight values an instruction.
static int64_t count_not_finite(const bf16 *values, int64_t num_values) {
    enum { BLOCK = 1 << 14 };
    int64_t count = 0;
    for (int64_t first = 0; first < num_values; first += BLOCK) {
        int length = num_values - first < BLOCK ? (int)(num_values - first) : BLOCK;
        uint16_t of_block = 0;
        for (int i = 0; i < length; i++) of_block += (values[first + i] & 0x7f80) == 0x7f80;
        count += of_block;
    }
    return count;
}

Status engine_load_weight(Engine *e, const char *name, const void *data, int64_t rows, int64_t cols,
                          int64_t *num_not_finite) {
    WeightSlot *slot = NULL;
    TRY(find_slot(e, name, rows, cols, &slot));
    if (!data || !num_not_finite) return fail(STATUS_INVALID_ARGUMENT, "data or num_not_finite is null");
    if (slot->is_loaded) return fail(STATUS_INVALID_ARGUMENT, "%s was loaded before", name);
    const Kernels *k = e->model.kernels;
    *num_not_finite = count_not_finite(data, rows * cols);
    if (slot->matrix)
        TRY(outcome(e, k->pack_weight(slot->matrix, data, e->model.stream)));
    else
        TRY(outcome(e, k->copy_in(*slot->vector, data, cols * sizeof(bf16), e->model.stream)));
    TRY(outcome(e, k->synchronize(e->model.stream)));  // the caller may free `data` now
    slot->is_loaded = 1;
    return STATUS_OK;
}

Status engine_read_weight(Engine *e, const char *name, void *data, int64_t rows, int64_t cols) {
    WeightSlot *slot = NULL;
    TRY(find_slot(e, name, rows, cols, &slot));
    if (!data) return fail(STATUS_INVALID_ARGUMENT, "data is null");
    if (!slot->is_loaded) return fail(STATUS_INVALID_ARGUMENT, "%s is not loaded", name);
    const Kernels *k = e->model.kernels;
    if (slot->matrix) return outcome(e, k->unpack_weight(data, slot->matrix, e->model.stream));
    return outcome(e, k->copy_out(data, *slot->vector, cols * sizeof(bf16), e->model.stream));
}

Status engine_finish_loading(Engine *e) {
    TRY(check_alive(e));
    for (int i = 0; i < e->num_slots; i++)
        if (!e->slots[i].is_loaded)
            return fail(STATUS_INVALID_ARGUMENT, "%s was not loaded", e->slots[i].name);
    if (e->is_ready) return fail(STATUS_INVALID_ARGUMENT, "engine_finish_loading was called before");
    TRY(outcome(e, prepare_decode(e)));
    e->is_ready = 1;
    return STATUS_OK;
}
