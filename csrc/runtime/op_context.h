// op_context.h -- what every function of ops.h works with: a backend, and memory for the time of one call.

#pragma once
#include "../include/ops.h"
#include "../model/model.h"

struct OpContext {
    const Kernels *kernels;
    Stream stream;
};

// The backend memory of one call, given back when the call leaves its scope, whichever way.
typedef struct Buffers {
    OpContext *context;
    void *memory[12];
    int count;
} Buffers;

static inline void buffers_free(Buffers *buffers) {
    for (int i = 0; i < buffers->count; i++)
        buffers->context->kernels->free(buffers->memory[i], buffers->context->stream);
}

#define SCOPED_BUFFERS(name, op_context) \
    Buffers name __attribute__((cleanup(buffers_free))) = {.context = op_context}

static inline Status output(Buffers *buffers, void *pointer_to_pointer, size_t bytes) {
    void *memory;
    TRY(buffers->context->kernels->alloc(&memory, bytes, buffers->context->stream));
    buffers->memory[buffers->count++] = memory;
    memcpy(pointer_to_pointer, &memory, sizeof memory);
    return STATUS_OK;
}

static inline Status input(Buffers *buffers, void *pointer_to_pointer, const void *host, size_t bytes) {
    TRY(output(buffers, pointer_to_pointer, bytes));
    void *memory;
    memcpy(&memory, pointer_to_pointer, sizeof memory);
    return buffers->context->kernels->copy_in(memory, host, bytes, buffers->context->stream);
}

static inline Status input_matrix(Buffers *buffers, Matrix *matrix, const bf16 *host, int rows, int cols) {
    const Kernels *k = buffers->context->kernels;
    *matrix = (Matrix){.rows = rows, .cols = cols};
    TRY(output(buffers, &matrix->data, k->packed_bytes(rows, cols)));
    return k->pack_weight(matrix, host, buffers->context->stream);
}

static inline Status fetch(Buffers *buffers, void *host, const void *memory, size_t bytes) {
    return buffers->context->kernels->copy_out(host, memory, bytes, buffers->context->stream);
}

static inline Status check_positive(const char *name, int64_t value) {
    if (value < 1)
        return fail(STATUS_INVALID_ARGUMENT, "%s is %lld, must be at least 1", name, (long long)value);
    return STATUS_OK;
}

static inline Status check_pointers(const void *context, const void *out, const void *first,
                                    const void *second) {
    if (!context || !out || !first || !second)
        return fail(STATUS_INVALID_ARGUMENT, "context, the output or an input is null");
    return STATUS_OK;
}
