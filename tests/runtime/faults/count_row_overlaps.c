// count_row_overlaps.c -- the CPU twin with a gather that tells where it writes over rows that it reads.
//
// Linked instead of twin_kernels (--wrap). On the GPU rows are gathered side by side, in any order: there a
// row that is written before it was read is lost, while the twin, row after row, may be lucky.

#include <stdint.h>

#include "../../../csrc/kernels/kernels.h"

const Kernels *__real_twin_kernels(void);
const Kernels *__wrap_twin_kernels(void);

static int overlaps;

__attribute__((visibility("default"))) int count_row_overlaps(void);

// Since the last call.
int count_row_overlaps(void) {
    int count = overlaps;
    overlaps = 0;
    return count;
}

static Status watched(bf16 *out, const bf16 *x, const int32_t *indices, int num_rows, int width,
                      Stream stream) {
    uintptr_t begin = (uintptr_t)out, row_bytes = (uintptr_t)width * sizeof(bf16);
    uintptr_t end = begin + num_rows * row_bytes;
    for (int i = 0; i < num_rows; i++) {
        uintptr_t row = (uintptr_t)x + indices[i] * row_bytes;
        if (row < end && begin < row + row_bytes) overlaps++;
    }
    return __real_twin_kernels()->gather_rows(out, x, indices, num_rows, width, stream);
}

const Kernels *__wrap_twin_kernels(void) {
    static Kernels kernels;
    kernels = *__real_twin_kernels();
    kernels.gather_rows = watched;
    return &kernels;
}
