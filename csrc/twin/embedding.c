// embedding.c -- rows of the embedding table, and whole rows of any activation.
//
//   out[t] = table[ids[t]]
//
// Shapes    table [vocab_size, hidden_size] packed, ids [num_tokens], out [num_tokens, hidden_size]; bf16
// Rounding  none: copies
// Source    transformers nn.Embedding
// See       tests/twin/test_embedding.py

#include "../kernels/kernels.h"
#include "packed_matrix.h"

Status twin_embedding(bf16 *out, const Matrix *table, const int32_t *ids, int num_tokens, Stream stream) {
    (void)stream;
    for (int token = 0; token < num_tokens; token++)
        for (int k = 0; k < table->cols; k++)
            out[(size_t)token * table->cols + k] = *packed_element(table, ids[token], k);
    return STATUS_OK;
}

Status twin_gather_rows(bf16 *out, const bf16 *x, const int32_t *indices, int num_rows, int width,
                        Stream stream) {
    (void)stream;
    for (int row = 0; row < num_rows; row++)
        memcpy(out + (size_t)row * width, x + (size_t)indices[row] * width, (size_t)width * sizeof(bf16));
    return STATUS_OK;
}
