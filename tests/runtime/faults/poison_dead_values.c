// poison_dead_values.c -- the twin's table with an LM head that first destroys what should be dead by then.
//
// Every byte of the allocation that the logits lie in is set, before they are computed and again when the
// next step begins: who still reads a value that shared their memory, or logits of a step that is over, reads
// NaN. Linked into a library built for tests only (tests/runtime/test_dead_values.py).

#include <string.h>
#include "../../../csrc/kernels/kernels.h"

#define EXPORT __attribute__((visibility("default")))

enum { MOST_ALLOCATIONS = 4096, NAN_BYTE = 0xff };

const Kernels *__real_twin_kernels(void);

static struct {
    char *memory;
    size_t bytes;
} allocations[MOST_ALLOCATIONS];
static int num_allocations;
static int shared;  // the allocation that the last logits lay in, and one more; 0: none yet
static long poisoned;
static int poisons_input;

EXPORT long dead_values_poisoned(void) {
    return poisoned;
}
// The LM head's own input is destroyed too, so that the test must fail.
EXPORT void dead_values_poison_input(int does) {
    poisons_input = does;
}

static int allocation_of(const void *pointer) {
    for (int i = num_allocations; i > 0; i--) {
        const char *memory = allocations[i - 1].memory, *at = pointer;
        if (memory && memory <= at && at < memory + allocations[i - 1].bytes) return i;
    }
    return 0;
}

static void poison(int allocation) {
    if (!allocation) return;
    memset(allocations[allocation - 1].memory, NAN_BYTE, allocations[allocation - 1].bytes);
    poisoned++;
}

static Status recording_alloc(void **memory, size_t bytes, Stream stream) {
    TRY(__real_twin_kernels()->alloc(memory, bytes, stream));
    if (num_allocations == MOST_ALLOCATIONS) return fail(STATUS_OUT_OF_MEMORY, "too many for this test");
    allocations[num_allocations].memory = *memory;
    allocations[num_allocations++].bytes = bytes;
    return STATUS_OK;
}

static void recording_free(void *memory, Stream stream) {
    int allocation = memory ? allocation_of(memory) : 0;
    if (allocation) allocations[allocation - 1].memory = NULL;
    if (allocation == shared) shared = 0;
    __real_twin_kernels()->free(memory, stream);
}

static Status embedding(bf16 *out, const Matrix *table, const int32_t *ids, int num_tokens, Stream stream) {
    poison(shared);
    return __real_twin_kernels()->embedding(out, table, ids, num_tokens, stream);
}

static Status poisoning_linear_f32(float *out, const bf16 *x, const Matrix *weight, int num_tokens,
                                   Stream stream) {
    shared = allocation_of(out);
    poison(shared);
    if (poisons_input) poison(allocation_of(x));
    return __real_twin_kernels()->linear_f32(out, x, weight, num_tokens, stream);
}

const Kernels *__wrap_twin_kernels(void) {
    static Kernels table;
    table = *__real_twin_kernels();
    table.alloc = recording_alloc;
    table.free = recording_free;
    table.embedding = embedding;
    table.linear_f32 = poisoning_linear_f32;
    return &table;
}
