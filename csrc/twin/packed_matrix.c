// packed_matrix.c -- weights into the twin's layout and back; copies, nothing is rounded.

#include "packed_matrix.h"

#include <string.h>

size_t twin_packed_bytes(int rows, int cols) {
    return (size_t)num_panels(rows) * PANEL_LANES * (size_t)cols * sizeof(bf16);
}

Status twin_pack_weight(Matrix *packed, const bf16 *weight, Stream stream) {
    (void)stream;
    for (int panel = 0; panel < num_panels(packed->rows); panel++) {
        int first = panel * PANEL_LANES;
        for (int k = 0; k < packed->cols; k++) {
            bf16 *lanes = packed_element(packed, first, k);
            for (int lane = 0; lane < PANEL_LANES; lane++)
                lanes[lane] =
                    first + lane < packed->rows ? weight[(size_t)(first + lane) * packed->cols + k] : 0;
        }
    }
    return STATUS_OK;
}

Status twin_unpack_weight(bf16 *weight, const Matrix *packed, Stream stream) {
    (void)stream;
    for (int row = 0; row < packed->rows; row++)
        for (int k = 0; k < packed->cols; k++)
            weight[(size_t)row * packed->cols + k] = *packed_element(packed, row, k);
    return STATUS_OK;
}
