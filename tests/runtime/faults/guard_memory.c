// guard_memory.c -- both backends' tables with a guard before and behind every allocation.
//
// A guard holds bytes that nobody writes; it is looked at when its allocation is given back, so that whatever
// wrote past an end, a kernel on a GPU too, is counted. The memory between begins as NaN and not as what an
// earlier call left there. Linked into a library built for tests only (tests/runtime/guarded.py).

#include <string.h>
#include "../../../csrc/kernels/kernels.h"

#define EXPORT __attribute__((visibility("default")))

enum { MOST_ALLOCATIONS = 4096, GUARD_BYTES = 4096, FILL_BYTES = 1 << 20, GUARD = 0xa5, NAN_BYTE = 0xff };

const Kernels *__real_twin_kernels(void);
Status __real_cuda_kernels(const Kernels **kernels);

static struct {
    char *memory;  // between the guards; null: given back
    size_t bytes;
} allocations[MOST_ALLOCATIONS];
static long checked, broken;
static int overruns;
static unsigned char guard[GUARD_BYTES], nan_bytes[FILL_BYTES];

EXPORT long guards_checked(void) {
    return checked;
}
EXPORT long guards_broken(void) {
    return broken;
}
// residual_add is asked for one value more than its arrays hold, so that a guard must break.
EXPORT void guards_overrun(int does) {
    overruns = does;
}

static Status remember(char *memory, size_t bytes) {
    for (int i = 0; i < MOST_ALLOCATIONS; i++) {
        if (allocations[i].memory) continue;
        allocations[i].memory = memory;
        allocations[i].bytes = bytes;
        return STATUS_OK;
    }
    return fail(STATUS_OUT_OF_MEMORY, "too many allocations for this test");
}

static Status guarded_alloc(const Kernels *real, void **memory, size_t bytes, Stream stream) {
    char *whole;
    TRY(real->alloc((void **)&whole, bytes + 2 * GUARD_BYTES, stream));
    memset(guard, GUARD, sizeof guard);
    memset(nan_bytes, NAN_BYTE, sizeof nan_bytes);
    TRY(real->copy_in(whole, guard, GUARD_BYTES, stream));
    TRY(real->copy_in(whole + GUARD_BYTES + bytes, guard, GUARD_BYTES, stream));
    for (size_t at = 0; at < bytes; at += FILL_BYTES) {
        size_t count = bytes - at < FILL_BYTES ? bytes - at : FILL_BYTES;
        TRY(real->copy_in(whole + GUARD_BYTES + at, nan_bytes, count, stream));
    }
    *memory = whole + GUARD_BYTES;
    return remember(whole + GUARD_BYTES, bytes);
}

static int is_whole(const Kernels *real, const char *memory, Stream stream) {
    static unsigned char found[GUARD_BYTES];
    memset(found, 0, sizeof found);
    return real->copy_out(found, memory, GUARD_BYTES, stream) == STATUS_OK &&
           !memcmp(found, guard, GUARD_BYTES);
}

static void guarded_free(const Kernels *real, void *memory, Stream stream) {
    if (!memory) return;
    for (int i = 0; i < MOST_ALLOCATIONS; i++) {
        if (allocations[i].memory != memory) continue;
        char *whole = allocations[i].memory - GUARD_BYTES;
        checked++;
        broken += !is_whole(real, whole, stream) ||
                  !is_whole(real, allocations[i].memory + allocations[i].bytes, stream);
        allocations[i].memory = NULL;
        real->free(whole, stream);
        return;
    }
}

static const Kernels *real_cuda(void) {
    const Kernels *kernels = NULL;
    return __real_cuda_kernels(&kernels) == STATUS_OK ? kernels : NULL;
}

#define GUARDED(backend, real)                                                                             \
    static Status guarded_##backend##_alloc(void **memory, size_t bytes, Stream stream) {                  \
        return guarded_alloc(real, memory, bytes, stream);                                                 \
    }                                                                                                      \
    static void guarded_##backend##_free(void *memory, Stream stream) {                                    \
        guarded_free(real, memory, stream);                                                                \
    }                                                                                                      \
    static Status guarded_##backend##_residual_add(bf16 *out, const bf16 *x, const bf16 *y, int64_t count, \
                                                   Stream stream) {                                        \
        return (real)->residual_add(out, x, y, count + overruns, stream);                                  \
    }                                                                                                      \
    static const Kernels *guarded_##backend(void) {                                                        \
        static Kernels table;                                                                              \
        table = *(real);                                                                                   \
        table.alloc = guarded_##backend##_alloc;                                                           \
        table.free = guarded_##backend##_free;                                                             \
        table.residual_add = guarded_##backend##_residual_add;                                             \
        return &table;                                                                                     \
    }

GUARDED(twin, __real_twin_kernels())
GUARDED(cuda, real_cuda())

const Kernels *__wrap_twin_kernels(void) {
    return guarded_twin();
}

Status __wrap_cuda_kernels(const Kernels **kernels) {
    TRY(__real_cuda_kernels(kernels));
    *kernels = guarded_cuda();
    return STATUS_OK;
}
