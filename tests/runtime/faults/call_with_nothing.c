// call_with_nothing.c -- every operation of a backend asked for no row at all: no error, and nothing written.
//
// The library's own functions never ask so. Linked into a library built for tests only
// (tests/runtime/guarded.py).

#include "../../../csrc/kernels/kernels.h"

enum { ROOM = 64 };

static Status each(const Kernels *k, void *memory, Stream stream, const char **asked) {
    int32_t *ids = memory;
    float *logits = memory;
    Matrix matrix = {.data = memory, .rows = 16, .cols = 16}, none = {.data = memory, .cols = 16};
    KvLayer cache = {memory, 1, 16, 1, 64};
    BatchIndex batch = {.positions = ids};
#define ASK(operation, ...) \
    *asked = #operation;    \
    if (k->operation) TRY(k->operation(__VA_ARGS__, stream))
    ASK(pack_weight, &none, memory);
    ASK(unpack_weight, memory, &none);
    ASK(embedding, memory, &matrix, ids, 0);
    ASK(gather_rows, memory, memory, ids, 0, 16);
    ASK(rms_norm, memory, memory, memory, 0, 16, 1e-5f);
    ASK(linear, memory, memory, &matrix, 0);
    ASK(linear, memory, memory, &none, 1);
    ASK(linear_f32, logits, memory, &matrix, 0);
    ASK(rotary_embedding, memory, memory, memory, ids, 0, 1, 64);
    ASK(write_kv_cache, &cache, memory, memory, ids, 0);
    ASK(read_kv_cache, NULL, NULL, &cache, NULL, 0);
    ASK(attention, memory, memory, &cache, &batch, 1);
    ASK(silu_and_mul, memory, memory, memory, 0);
    ASK(residual_add, memory, memory, memory, 0);
    ASK(linear_add, memory, memory, &matrix, memory, 0);
    ASK(gated_linear, memory, memory, &matrix, &matrix, 0);
    ASK(qkv_linear, memory, &cache, memory, &matrix, &matrix, &matrix, memory, ids, ids, 0);
    ASK(argmax, ids, logits, 0, 16);
    ASK(edit_logits, logits, logits, memory, memory, 0, 16);
    ASK(restore_logits, logits, logits, memory, 0, 16);
    ASK(sample, ids, logits, memory, 0, 16);
    ASK(score_tokens, memory, logits, ids, memory, 0, 16);
    ASK(tensor_core_step, logits, logits, memory, memory, 0);
    ASK(exp2, logits, logits, 0);
    *asked = "synchronize";
    return k->synchronize(stream);
}

// The operation that was asked last is left in `asked`.
__attribute__((visibility("default"))) int call_with_nothing(int is_cuda, const char **asked) {
    const Kernels *k = twin_kernels();
    Stream stream;
    void *memory;
    *asked = "cuda_kernels";
    if (is_cuda) TRY(cuda_kernels(&k));
    *asked = "open_stream";
    TRY(k->open_stream(&stream, 1));
    Status status = k->alloc(&memory, ROOM, stream);
    if (status == STATUS_OK) status = each(k, memory, stream, asked);
    static unsigned char found[ROOM];
    if (status == STATUS_OK) status = k->copy_out(found, memory, ROOM, stream);
    for (int i = 0; status == STATUS_OK && i < ROOM; i++)
        if (found[i] != 0xff) status = fail(STATUS_INVALID_ARGUMENT, "byte %d was written", i);
    k->free(memory, stream);
    k->close_stream(stream);
    return status;
}
