// tensor_core.h -- the k16 step of docs/numerics.md section 1 on a CPU: one readable, many at once.
//
// The step has no closed form in fused multiply-adds, so the twin takes it apart: exponents are added and
// compared, products are scaled and cut to integers. A panel holds 16 outputs side by side (lanes), decoded
// once and used by many rows.

#pragma once
#include "../common/bf16.h"
#include "../common/numerics.h"

enum { PANEL_LANES = 16 };

// Sixteen values of k by sixteen lanes: the b operands of sixteen outputs for one step.
typedef struct Panel {
    float value[NUMERICS_STEP][PANEL_LANES];
    int32_t exponent[NUMERICS_STEP][PANEL_LANES];
} Panel;

// The step itself, one output, straight from the contract: the specification of everything below.
float tensor_core_step(float c, const bf16 *a, const bf16 *b);

// Values and biased exponents of n bf16 numbers, as steps want their a operand.
void tensor_core_decode(float *value, int32_t *exponent, const bf16 *x, int n);

// Element (k, lane) is packed[k * k_stride + lane * lane_stride].
void tensor_core_decode_panel(Panel *panel, const bf16 *packed, int k_stride, int lane_stride);

// One step for num_rows x 16 outputs: c[row][lane] = step(c[row][lane], a[row][..], panel[..][lane]).
// a_value and a_exponent point at the step's first value of row 0; rows are a_stride and c_stride apart.
void tensor_core_step_rows(float *c, int c_stride, const float *a_value, const int32_t *a_exponent,
                           int a_stride, int num_rows, const Panel *panel);
