// tensor_core_lanes.h -- one step of many rows, LANES outputs of each at a time.
//
// Included by tensor_core.c once per route, with these defined; each name here carries the route's.
//
// ROUTE     what the names end in
// LANES     8: one AVX2 register, or two of SSE2 or NEON; 16: one of AVX-512
// TARGET    the attribute of the instructions it may use
// LARGER    the target's own maximum of two Ints, where compilers would take a comparison and a choice
// CUT       the target's own conversion to float toward zero, where it has one

#define JOINED_(name, route) name##_##route
#define JOINED(name, route) JOINED_(name, route)
#define Floats JOINED(Floats, ROUTE)
#define Ints JOINED(Ints, ROUTE)
#define Words JOINED(Words, ROUTE)
#define max_into JOINED(max_into, ROUTE)
#define cut_to_24_bits JOINED(cut_to_24_bits, ROUTE)
#define step_row JOINED(step_row, ROUTE)
#define step_rows JOINED(step_rows, ROUTE)

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));  // for sums that may wrap

TARGET ALWAYS_INLINE void max_into(Ints *largest, const Ints *x) {
#ifdef LARGER
    *largest = LARGER(*largest, *x);
#else
    Ints greater = *x > *largest;
    *largest = (*x & greater) | (*largest & ~greater);
#endif
}

TARGET ALWAYS_INLINE Floats cut_to_24_bits(Ints total) {
#ifdef CUT
    return CUT(total);
#else
    // Clear as many low bits as the magnitude has above its 24th.
    Ints sign = total >> 31;
    Ints magnitude = (total ^ sign) - sign;
    Ints excess = magnitude >> 24;
    excess |= excess >> 1;
    excess |= excess >> 2;
    excess |= excess >> 4;
    magnitude &= ~excess;
    return __builtin_convertvector((magnitude ^ sign) - sign, Floats);
#endif
}

// One row of LANES outputs; lanes that the fast route cannot serve come back negative in the result.
TARGET ALWAYS_INLINE Ints step_row(float *c_row, const float *a, const int32_t *ea, const Panel *panel,
                                   int first_lane) {
    const Ints one = (Ints){0} + 1;
    Floats c;
    Ints largest;
    memcpy(&c, c_row, sizeof c);
    memcpy(&largest, c_row, sizeof largest);
    largest = (largest >> 23) & 0xff;
    max_into(&largest, &one);  // denormals and zero count as 1
    largest += BF16_BIAS;
    for (int k = 0; k < NUMERICS_STEP; k++) {
        Ints exponent;
        memcpy(&exponent, panel->exponent[k] + first_lane, sizeof exponent);
        exponent += ea[k];
        max_into(&largest, &exponent);
    }
    Ints unserved = (largest - FAST_MIN) | (FAST_MAX - largest);
    // 2^(25 - e) as a bit pattern; e = largest - 2 * bias.
    Ints scale_bits = (3 * BF16_BIAS + FRACTION_BITS - largest) << 23;
    Floats scale;
    memcpy(&scale, &scale_bits, sizeof scale);
    Words sum = {0};  // of a lane that is not served it may wrap
    for (int k = 0; k < NUMERICS_STEP; k++) {
        Floats b;
        memcpy(&b, panel->value[k] + first_lane, sizeof b);
        Ints term = __builtin_convertvector(a[k] * b * scale, Ints);  // exact, exact, and then the cut
        sum += (Words)term;
    }
    // Sixteen products stay below 2^31; with c the sum can pass it by a hair, and then takes the long way.
    Ints cut_c = __builtin_convertvector(c * scale, Ints);
    Ints total = (Ints)(sum + (Words)cut_c);
    unserved |= ((Ints)sum ^ total) & (cut_c ^ total);
    Ints result_scale_bits = (largest - (BF16_BIAS + FRACTION_BITS)) << 23;  // 2^(e - 25)
    Floats result_scale;
    memcpy(&result_scale, &result_scale_bits, sizeof result_scale);
    Floats d = cut_to_24_bits(total) * result_scale;
    memcpy(c_row, &d, sizeof d);
    return unserved;
}

TARGET static void step_rows(float *c, int c_stride, const float *a_value, const int32_t *a_exponent,
                             int a_stride, int num_rows, const Panel *panel) {
    for (int first = 0; first < num_rows; first += BLOCK_ROWS) {
        int block_rows = num_rows - first < BLOCK_ROWS ? num_rows - first : BLOCK_ROWS;
        float old[BLOCK_ROWS][PANEL_LANES];
        int32_t unserved[BLOCK_ROWS][PANEL_LANES];
        int32_t any = 0;
        for (int i = 0; i < block_rows; i++) {
            float *c_row = c + (size_t)(first + i) * c_stride;
            const float *a = a_value + (size_t)(first + i) * a_stride;
            const int32_t *ea = a_exponent + (size_t)(first + i) * a_stride;
            memcpy(old[i], c_row, sizeof old[i]);
            for (int lane = 0; lane < PANEL_LANES; lane += LANES) {
                Ints mask = step_row(c_row + lane, a, ea, panel, lane);
                memcpy(unserved[i] + lane, &mask, sizeof mask);
            }
        }
        for (int i = 0; i < block_rows; i++)
            for (int lane = 0; lane < PANEL_LANES; lane++) any |= unserved[i][lane];
        if (__builtin_expect(any >= 0, 1)) continue;
        for (int i = 0; i < block_rows; i++)
            for (int lane = 0; lane < PANEL_LANES; lane++)
                if (unserved[i][lane] < 0)
                    c[(size_t)(first + i) * c_stride + lane] =
                        step_lane(old[i][lane], a_value + (size_t)(first + i) * a_stride, panel, lane);
    }
}

#undef JOINED_
#undef JOINED
#undef Floats
#undef Ints
#undef Words
#undef max_into
#undef cut_to_24_bits
#undef step_row
#undef step_rows
#undef ROUTE
#undef LANES
#undef TARGET
#undef LARGER
#undef CUT
