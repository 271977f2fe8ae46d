// argmax.c -- the most likely token of each row of logits.
//
//   ids[r] = the lowest i with logits[r, i] = max_j logits[r, j]; a NaN is larger than every number
//
// Shapes    logits [num_rows, vocab_size] float32, ids [num_rows]
// Rounding  none
// See       kernels/argmax.cu, tests/twin/test_argmax.py

#include "../kernels/kernels.h"

Status twin_argmax(int32_t *ids, const float *logits, int num_rows, int vocab_size, Stream stream) {
    (void)stream;
    for (int row = 0; row < num_rows; row++) {
        const float *values = logits + (size_t)row * vocab_size;
        int best = 0;
        for (int i = 1; i < vocab_size && values[best] == values[best]; i++)
            if (values[i] > values[best] || values[i] != values[i]) best = i;
        ids[row] = best;
    }
    return STATUS_OK;
}
