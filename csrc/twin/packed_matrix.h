// packed_matrix.h -- the twin's weight layout: panels of 16 rows, k-major, so that one k of 16 outputs is
// contiguous.
//
//   element (row, k) is at ((row / 16) * cols + k) * 16 + row % 16; missing rows of the last panel are zero

#pragma once
#include "../kernels/kernels.h"
#include "tensor_core.h"

static inline int num_panels(int rows) {
    return (rows + PANEL_LANES - 1) / PANEL_LANES;
}

static inline bf16 *packed_element(const Matrix *matrix, int row, int k) {
    size_t panel = (size_t)(row / PANEL_LANES) * matrix->cols;
    return (bf16 *)matrix->data + (panel + k) * PANEL_LANES + row % PANEL_LANES;
}
