// tensor_core.c -- what one tensor-core instruction of a Hopper GPU computes, reproduced to the bit.
//
//   d = cut32(sum of 17 terms, each cut to a multiple of 2^(e - 25)),  e = the terms' largest exponent
//
// Rounding  every cut is toward zero; the sum of the cut terms is exact
// Source    docs/numerics.md section 1; measured on an H200 (golden/hardware/)
// See       tests/twin/test_tensor_core.py

#include "tensor_core.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum {
    FRACTION_BITS = 25,  // below the largest exponent, kept of every term
    BF16_BIAS = 127,
    ZERO = -1000,       // stands for the exponent of zero: a product that is zero has no say in the largest
    NOT_FINITE = 3000,  // stands for the exponent of NaN and infinity, beside a zero too
    // From this sum of two on, one is NOT_FINITE: the step takes the specification.
    NOT_FINITE_PRODUCT = 1000,
    // The fast route works in float32 and int32. With e the unbiased largest exponent, e + 2 * BF16_BIAS
    // must lie in this range: then no product overflows or loses a kept bit to underflow, and 2^(25 - e) is
    // normal.
    FAST_MIN = 153,
    FAST_MAX = 379,
};

static int biased_exponent(bf16 x) {
    int exponent = (x >> 7) & 0xff;
    if ((x & 0x7fff) == 0) return ZERO;
    return exponent == 0xff ? NOT_FINITE : exponent == 0 ? 1 : exponent;
}

static int bf16_significand(bf16 x) {
    int exponent = (x >> 7) & 0xff;
    int magnitude = (x & 0x7f) | (exponent ? 0x80 : 0);
    return x & 0x8000 ? -magnitude : magnitude;
}

// value * 2^shift, cut toward zero.
static int64_t shift_and_cut(int64_t value, int shift) {
    if (shift >= 0) return value * ((int64_t)1 << shift);
    if (shift < -62) return 0;
    return value / ((int64_t)1 << -shift);
}

static uint32_t float_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static float float_from_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

// sum * 2^exponent as float32, cut toward zero, denormals included.
static float cut_to_float(int64_t sum, int exponent) {
    if (sum == 0) return 0.0f;
    uint32_t sign = sum < 0 ? 0x80000000u : 0;
    uint64_t magnitude = sum < 0 ? -(uint64_t)sum : (uint64_t)sum;
    while (magnitude >= (1u << 24)) magnitude >>= 1, exponent++;
    while (magnitude < (1u << 23)) magnitude <<= 1, exponent--;
    int biased = exponent + 23 + BF16_BIAS;
    if (biased >= 255) return float_from_bits(sign | 0x7f800000u);
    if (biased <= 0)
        return float_from_bits(sign | (biased < -22 ? 0 : (uint32_t)(magnitude >> (1 - biased))));
    return float_from_bits(sign | (uint32_t)biased << 23 | ((uint32_t)magnitude & 0x7fffffu));
}

// NaN where the hardware gives NaN, else an infinity of the terms' common sign.
static float step_not_finite(float c, const bf16 *a, const bf16 *b) {
    float sum = c;
    for (int k = 0; k < NUMERICS_STEP; k++) {
        float product = bf16_to_float(a[k]) * bf16_to_float(b[k]);
        int is_finite_pair = biased_exponent(a[k]) != NOT_FINITE && biased_exponent(b[k]) != NOT_FINITE;
        if (!is_finite_pair) sum += product;  // finite terms cannot turn an infinity
    }
    return sum != sum ? float_from_bits(0x7fffffffu) : sum;
}

float tensor_core_step(float c, const bf16 *a, const bf16 *b) {
    int c_biased = (int)(float_bits(c) >> 23) & 0xff;
    int c_exponent = (c_biased ? c_biased : 1) - BF16_BIAS;
    int largest = c_exponent;
    if (c_biased == 0xff) return step_not_finite(c, a, b);
    for (int k = 0; k < NUMERICS_STEP; k++) {
        int exponent = biased_exponent(a[k]) + biased_exponent(b[k]);
        if (exponent >= NOT_FINITE_PRODUCT) return step_not_finite(c, a, b);
        if (exponent - 2 * BF16_BIAS > largest) largest = exponent - 2 * BF16_BIAS;
    }
    int32_t c_significand = (int32_t)(float_bits(c) & 0x7fffffu) | (c_biased ? 0x800000 : 0);
    if (float_bits(c) >> 31) c_significand = -c_significand;
    // c = significand * 2^(exponent - 23) and a product = significands * 2^(exponent - 14), in units of
    // 2^(largest - 25).
    int64_t sum = shift_and_cut(c_significand, c_exponent - largest + FRACTION_BITS - 23);
    for (int k = 0; k < NUMERICS_STEP; k++) {
        int exponent = biased_exponent(a[k]) + biased_exponent(b[k]) - 2 * BF16_BIAS;
        int product = bf16_significand(a[k]) * bf16_significand(b[k]);
        sum += shift_and_cut(product, exponent - largest + FRACTION_BITS - 14);
    }
    return cut_to_float(sum, largest - FRACTION_BITS);
}

#if defined(__x86_64__)
// NO_AVX512 and NO_AVX2 let a test build the narrower routes on a machine that has the widest.
#define AVX512 "avx512f,avx512dq,avx512bw,avx512vl"
static int has_avx512(void) {
#ifdef NO_AVX512
    return 0;
#else
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#endif
}

static int has_avx2(void) {
#ifdef NO_AVX2
    return 0;
#else
    return __builtin_cpu_supports("avx2");
#endif
}
#endif

// Values and biased exponents, without a branch so that compilers take eight at a time.
static inline __attribute__((always_inline)) void decode_values(float *value, int32_t *exponent,
                                                                const bf16 *x, int n) {
    for (int i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)x[i] << 16;
        int32_t biased = (int32_t)(bits >> 23) & 0xff;
        biased = biased == 0xff ? NOT_FINITE : biased;
        biased = biased == 0 ? 1 : biased;
        exponent[i] = (bits & 0x7fffffffu) == 0 ? ZERO : biased;
        memcpy(&value[i], &bits, sizeof bits);
    }
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) static void decode_values_avx2(float *value, int32_t *exponent,
                                                               const bf16 *x, int n) {
    decode_values(value, exponent, x, n);
}

__attribute__((target(AVX512))) static void decode_values_avx512(float *value, int32_t *exponent,
                                                                 const bf16 *x, int n) {
    decode_values(value, exponent, x, n);
}
#endif

void tensor_core_decode(float *value, int32_t *exponent, const bf16 *x, int n) {
#if defined(__x86_64__)
    if (has_avx512()) {
        decode_values_avx512(value, exponent, x, n);
        return;
    }
    if (has_avx2()) {
        decode_values_avx2(value, exponent, x, n);
        return;
    }
#endif
    decode_values(value, exponent, x, n);
}

void tensor_core_decode_panel(Panel *panel, const bf16 *packed, int k_stride, int lane_stride) {
    const bf16 *lanes = packed;
    bf16 gathered[NUMERICS_STEP][PANEL_LANES];
    if (k_stride != PANEL_LANES || lane_stride != 1) {
        for (int k = 0; k < NUMERICS_STEP; k++)
            for (int lane = 0; lane < PANEL_LANES; lane++)
                gathered[k][lane] = packed[(size_t)k * k_stride + (size_t)lane * lane_stride];
        lanes = &gathered[0][0];
    }
    tensor_core_decode(&panel->value[0][0], &panel->exponent[0][0], lanes, NUMERICS_STEP * PANEL_LANES);
}

// One lane through the specification; the panel holds bf16 values, so taking their upper halves is exact.
static float step_lane(float c, const float *a_value, const Panel *panel, int lane) {
    bf16 a[NUMERICS_STEP], b[NUMERICS_STEP];
    int any = float_bits(c) != 0;
    for (int k = 0; k < NUMERICS_STEP; k++) {
        a[k] = (bf16)(float_bits(a_value[k]) >> 16);
        b[k] = (bf16)(float_bits(panel->value[k][lane]) >> 16);
        any |= (a[k] & 0x7fff) && (b[k] & 0x7fff);
    }
    // Zeros alone: common (a probability row that underflowed), and not worth the long way, unless 0 * inf.
    if (!any) {
        int finite = 1;
        for (int k = 0; k < NUMERICS_STEP; k++)
            finite &= biased_exponent(a[k]) != NOT_FINITE && biased_exponent(b[k]) != NOT_FINITE;
        if (finite) return 0.0f;
    }
    return tensor_core_step(c, a, b);
}

// Without it the vectors would pass between the functions through memory.
#define ALWAYS_INLINE static inline __attribute__((always_inline))

// Rows are taken in blocks, so that one look tells whether any lane of the block must go the long way.
enum { BLOCK_ROWS = 8 };

#define ROUTE portable
#define LANES 8
#define TARGET
#include "tensor_core_lanes.h"

#if defined(__x86_64__)
#define ROUTE avx2
#define LANES 8
#define TARGET __attribute__((target("avx2")))
#define LARGER(x, y) ((Ints)_mm256_max_epi32((__m256i)(x), (__m256i)(y)))
#include "tensor_core_lanes.h"

#define ROUTE avx512
#define LANES 16
#define TARGET __attribute__((target(AVX512)))
#define LARGER(x, y) ((Ints)_mm512_max_epi32((__m512i)(x), (__m512i)(y)))
#define CUT(x) ((Floats)_mm512_cvt_roundepi32_ps((__m512i)(x), _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC))
#include "tensor_core_lanes.h"
#endif

void tensor_core_step_rows(float *c, int c_stride, const float *a_value, const int32_t *a_exponent,
                           int a_stride, int num_rows, const Panel *panel) {
#if defined(__x86_64__)
    if (has_avx512()) {
        step_rows_avx512(c, c_stride, a_value, a_exponent, a_stride, num_rows, panel);
        return;
    }
    if (has_avx2()) {
        step_rows_avx2(c, c_stride, a_value, a_exponent, a_stride, num_rows, panel);
        return;
    }
#endif
    step_rows_portable(c, c_stride, a_value, a_exponent, a_stride, num_rows, panel);
}
