// mma_dump.cu -- record what this GPU's tensor cores compute, bit for bit, for the test of the k16 step.
//
//   D = C0 + A Bᵀ in k16 steps, ascending, by mma.sync.m16n8k16 (bf16 in, float32 accumulator)
//
// Record    int32 K, mode, M, N; A uint16 [M, K]; B uint16 [N, K]; C0 float32 [M, N]; D float32 [M, N];
//           little endian, records back to back until the end of the file
// Modes     the enum below; each aims at one clause of docs/numerics.md section 1
// Inputs    from a SplitMix64 generator seeded by (K, mode, repetition): the same on every machine
// Build     nvcc -O2 -gencode=arch=compute_90a,code=sm_90a -o mma_dump mma_dump.cu;  ./mma_dump FILE
// See       docs/numerics.md, csrc/twin/tensor_core.c, tests/twin

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include <cuda_runtime.h>

enum Mode {
    MODE_NORMAL = 0,        // values around 1
    MODE_WIDE = 1,          // exponents -10 .. 10: the cut of step 4 bites
    MODE_VERY_WIDE = 2,     // a over bf16's whole exponent range, c over float32's
    MODE_CANCELLATION = 3,  // pairs of products that annihilate, c close to minus the sum
    MODE_ONE_ZERO_IN_FOUR = 4,
    MODE_DENORMAL_INPUT = 5,   // bf16 denormals among normal values
    MODE_DENORMAL_RESULT = 6,  // products and c near and below 2^-126
    MODE_FAR_ACCUMULATOR = 7,  // |c| from 2^-40 to 2^40 times the products
    MODE_MAXIMAL_SUM = 8,      // 16 equal products just below 4: the sum passes 2^31 units of 2^(e-25)
    MODE_OVERFLOW = 9,         // products and sums around 2^128
    MODE_NOT_FINITE = 10,      // infinities and NaN in a, b and c
    MODE_SIGNED_ZERO = 11,     // +0 and -0 everywhere
    NUM_MODES = 12,
};

constexpr int kStepLength = 16;  // k values of one instruction
constexpr int kWarp = 32;
constexpr int kTileM = 16;
constexpr int kTileN = 8;

// SplitMix64: a 64-bit counter, mixed; the whole state is the seed.
struct Random {
    uint64_t state;

    uint64_t next() {
        state += 0x9e3779b97f4a7c15ull;
        uint64_t z = state;
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return z ^ (z >> 31);
    }
    int below(int limit) { return (int)(next() % (uint64_t)limit); }
    int between(int low, int high) { return low + below(high - low + 1); }
    bool one_in(int n) { return below(n) == 0; }
    // Mean 0, variance 1, from four uniform values; exact in double, so the same on every machine.
    double normal() {
        double sum = 0;
        for (int i = 0; i < 4; ++i) sum += (double)(next() >> 11) * 0x1p-53;
        return (sum - 2.0) * 1.7320508075688772;
    }
};

static uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static float float_from_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

// Nearest even; only finite values reach it.
static uint16_t bf16_bits(double value) {
    uint32_t bits = float_bits((float)value);
    return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static float bf16_value(uint16_t bits) {
    return float_from_bits((uint32_t)bits << 16);
}

static uint16_t make_bf16(int sign, int exponent_field, int mantissa) {
    return (uint16_t)((sign << 15) | (exponent_field << 7) | mantissa);
}

static float make_float(int sign, int exponent_field, uint32_t mantissa) {
    return float_from_bits(((uint32_t)sign << 31) | ((uint32_t)exponent_field << 23) |
                           (mantissa & 0x7fffffu));
}

struct Problem {
    int k, mode, m, n;
    std::vector<uint16_t> a, b;
    std::vector<float> c;

    uint16_t &a_at(int row, int i) { return a[(size_t)row * k + i]; }
    uint16_t &b_at(int row, int i) { return b[(size_t)row * k + i]; }
    float &c_at(int row, int col) { return c[(size_t)row * n + col]; }
};

static uint16_t draw_operand(Random &random, int mode, bool is_b) {
    double value = random.normal();
    int sign = random.below(2);
    switch (mode) {
        case MODE_WIDE:
            return bf16_bits(ldexp(value, random.between(-10, 10)));
        case MODE_VERY_WIDE:  // b stays below 1 so that most sums are finite
            return make_bf16(sign, random.between(1, is_b ? 126 : 254), random.below(128));
        case MODE_ONE_ZERO_IN_FOUR:
            return random.one_in(4) ? make_bf16(sign, 0, 0) : bf16_bits(value);
        case MODE_DENORMAL_INPUT:  // b large, so that a denormal a still counts beside small normal ones
            if (is_b)
                return make_bf16(sign, random.one_in(8) ? 0 : random.between(180, 250), random.below(128));
            return make_bf16(sign, random.one_in(2) ? 0 : random.between(1, 12), random.below(128));
        case MODE_DENORMAL_RESULT:  // products from 2^-156 to 2^-122
            return make_bf16(sign, 127 + random.between(-78, -61), random.below(128));
        case MODE_OVERFLOW:
            return make_bf16(sign, 127 + random.between(58, 64), random.below(128));
        case MODE_NOT_FINITE: {
            int kind = random.below(96);  // about one special value in five rows of 16
            if (kind == 0) return make_bf16(sign, 255, 0);
            if (kind == 1) return make_bf16(sign, 255, random.between(1, 127));
            if (kind == 2) return make_bf16(sign, 0, 0);  // meets an infinity now and then
            return bf16_bits(value);
        }
        case MODE_SIGNED_ZERO:
            return make_bf16(sign, random.one_in(64) ? 1 : 0, 0);
        default:
            return bf16_bits(value);
    }
}

static float draw_accumulator(Random &random, int mode) {
    int sign = random.below(2);
    uint32_t mantissa = (uint32_t)random.next();
    switch (mode) {
        case MODE_WIDE:
            return make_float(sign, 127 + random.between(-20, 20), mantissa);
        case MODE_VERY_WIDE:
            return make_float(sign, random.between(0, 254), mantissa);
        case MODE_ONE_ZERO_IN_FOUR:
            return random.one_in(4) ? make_float(sign, 0, 0) : (float)random.normal();
        case MODE_DENORMAL_INPUT:
            return make_float(sign, random.between(0, 120), mantissa);
        case MODE_DENORMAL_RESULT:
            return make_float(sign, random.between(0, 3), mantissa);
        case MODE_FAR_ACCUMULATOR:
            return make_float(sign, 127 + random.between(-40, 40), mantissa);
        case MODE_OVERFLOW:
            return make_float(sign, random.between(250, 254), random.one_in(4) ? 0x7fffffu : mantissa);
        case MODE_NOT_FINITE: {
            int kind = random.below(24);
            if (kind == 0) return make_float(sign, 255, 0);
            if (kind == 1) return make_float(sign, 255, mantissa | 1u);
            return (float)random.normal();
        }
        case MODE_SIGNED_ZERO:
            return make_float(sign, 0, 0);
        default:
            return random.one_in(2) ? 0.0f : (float)random.normal();
    }
}

// Cancellation: within each pair of k's the products are x and -x, but for a last-bit change now and then.
static void make_cancelling(Problem &problem, Random &random) {
    for (int i = 0; i + 1 < problem.k; i += 2) {
        for (int row = 0; row < problem.m; ++row) {
            problem.a_at(row, i + 1) = problem.a_at(row, i) ^ (uint16_t)random.one_in(4);
        }
        for (int row = 0; row < problem.n; ++row) problem.b_at(row, i + 1) = problem.b_at(row, i) ^ 0x8000u;
    }
    for (int row = 0; row < problem.m; ++row) {
        for (int col = 0; col < problem.n; ++col) {
            double sum = 0;
            for (int i = 0; i < problem.k; ++i) {
                sum += (double)bf16_value(problem.a_at(row, i)) * bf16_value(problem.b_at(col, i));
            }
            problem.c_at(row, col) = random.one_in(3) ? 0.0f : (float)-sum;
        }
    }
}

// Largest significands; signs by row (all equal, alternating, random), one exponent per row.
static void make_maximal(Problem &problem, Random &random) {
    for (int row = 0; row < problem.m; ++row) {
        int exponent = 127 + random.between(-20, 20);
        for (int i = 0; i < problem.k; ++i) {
            int sign = row % 4 == 3 ? random.below(2) : row % 4 == 2 ? i % 2 : row % 4;
            problem.a_at(row, i) = make_bf16(sign, exponent, random.one_in(16) && row >= 8 ? 126 : 127);
        }
        for (int col = 0; col < problem.n; ++col) {
            problem.c_at(row, col) = make_float(col % 2, exponent + random.between(-1, 2), 0x7fffffu);
        }
    }
    for (int row = 0; row < problem.n; ++row) {
        for (int i = 0; i < problem.k; ++i) problem.b_at(row, i) = make_bf16((row / 2) % 2, 127, 127);
    }
}

static Problem make_problem(int k, int mode, int m, int n, int repetition) {
    Random random{(uint64_t)k * 1000003u + (uint64_t)mode * 1009u + (uint64_t)repetition};
    Problem problem{k, mode, m, n, {}, {}, {}};
    for (int i = 0; i < m * k; ++i) problem.a.push_back(draw_operand(random, mode, false));
    for (int i = 0; i < n * k; ++i) problem.b.push_back(draw_operand(random, mode, true));
    for (int i = 0; i < m * n; ++i) problem.c.push_back(draw_accumulator(random, mode));
    if (mode == MODE_CANCELLATION) make_cancelling(problem, random);
    if (mode == MODE_MAXIMAL_SUM) make_maximal(problem, random);
    return problem;
}

__device__ uint32_t load_pair(const uint16_t *address) {
    return (uint32_t)address[0] | ((uint32_t)address[1] << 16);
}

// One warp computes one 16 x 8 tile of D.
__global__ void mma_dump_kernel(float *d, const uint16_t *a, const uint16_t *b, const float *c, int n,
                                int k) {
    int group = (int)threadIdx.x / 4, quad = (int)threadIdx.x % 4;
    int row = (int)blockIdx.x * kTileM + group, col = (int)blockIdx.y * kTileN;
    float sum[4];
    for (int i = 0; i < 4; ++i) sum[i] = c[(size_t)(row + 8 * (i / 2)) * n + col + 2 * quad + i % 2];
    for (int first = 0; first < k; first += kStepLength) {
        const uint16_t *upper = a + (size_t)row * k + first + 2 * quad;
        const uint16_t *lower = upper + (size_t)8 * k;
        const uint16_t *column = b + (size_t)(col + group) * k + first + 2 * quad;
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, "
            "{%0, %1, %2, %3};"
            : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
            : "r"(load_pair(upper)), "r"(load_pair(lower)), "r"(load_pair(upper + 8)),
              "r"(load_pair(lower + 8)), "r"(load_pair(column)), "r"(load_pair(column + 8)));
    }
    for (int i = 0; i < 4; ++i) d[(size_t)(row + 8 * (i / 2)) * n + col + 2 * quad + i % 2] = sum[i];
}

static bool succeeded(cudaError_t error, const char *what) {
    if (error != cudaSuccess) fprintf(stderr, "mma_dump: %s: %s\n", what, cudaGetErrorString(error));
    return error == cudaSuccess;
}

struct DeviceBuffers {
    void *a = nullptr, *b = nullptr, *c = nullptr, *d = nullptr;

    ~DeviceBuffers() {
        cudaFree(a);
        cudaFree(b);
        cudaFree(c);
        cudaFree(d);
    }
};

static bool compute(const Problem &problem, std::vector<float> &result) {
    DeviceBuffers device;
    size_t a_bytes = problem.a.size() * 2, b_bytes = problem.b.size() * 2, c_bytes = problem.c.size() * 4;
    result.resize(problem.c.size());
    if (!succeeded(cudaMalloc(&device.a, a_bytes), "cudaMalloc")) return false;
    if (!succeeded(cudaMalloc(&device.b, b_bytes), "cudaMalloc")) return false;
    if (!succeeded(cudaMalloc(&device.c, c_bytes), "cudaMalloc")) return false;
    if (!succeeded(cudaMalloc(&device.d, c_bytes), "cudaMalloc")) return false;
    cudaMemcpy(device.a, problem.a.data(), a_bytes, cudaMemcpyHostToDevice);
    cudaMemcpy(device.b, problem.b.data(), b_bytes, cudaMemcpyHostToDevice);
    cudaMemcpy(device.c, problem.c.data(), c_bytes, cudaMemcpyHostToDevice);
    mma_dump_kernel<<<dim3(problem.m / kTileM, problem.n / kTileN), kWarp>>>(
        (float *)device.d, (const uint16_t *)device.a, (const uint16_t *)device.b, (const float *)device.c,
        problem.n, problem.k);
    if (!succeeded(cudaGetLastError(), "launch")) return false;
    return succeeded(cudaMemcpy(result.data(), device.d, c_bytes, cudaMemcpyDeviceToHost), "copy out");
}

static bool write_record(FILE *file, const Problem &problem, const std::vector<float> &result) {
    int32_t header[4] = {problem.k, problem.mode, problem.m, problem.n};
    return fwrite(header, sizeof header, 1, file) == 1 &&
           fwrite(problem.a.data(), 2, problem.a.size(), file) == problem.a.size() &&
           fwrite(problem.b.data(), 2, problem.b.size(), file) == problem.b.size() &&
           fwrite(problem.c.data(), 4, problem.c.size(), file) == problem.c.size() &&
           fwrite(result.data(), 4, result.size(), file) == result.size();
}

int main(int argc, char **argv) {
    if (argc != 2) {
        fprintf(stderr, "usage: mma_dump FILE\n");
        return 2;
    }
    // Many single steps, where each clause shows by itself; then chains. The file stays below 1 MB.
    struct Shape {
        int k, m, n, repetitions, num_modes;
    };
    const Shape shapes[] = {{16, 32, 32, 3, NUM_MODES},
                            {32, 32, 32, 1, NUM_MODES},
                            {64, 32, 32, 1, NUM_MODES},
                            {512, 16, 16, 1, 5}};
    FILE *file = fopen(argv[1], "wb");
    if (file == nullptr) {
        fprintf(stderr, "mma_dump: cannot write %s\n", argv[1]);
        return 1;
    }
    int num_records = 0;
    size_t num_outputs = 0;
    for (const Shape &shape : shapes) {
        for (int mode = 0; mode < shape.num_modes; ++mode) {
            for (int repetition = 0; repetition < shape.repetitions; ++repetition) {
                Problem problem = make_problem(shape.k, mode, shape.m, shape.n, repetition);
                std::vector<float> result;
                if (!compute(problem, result) || !write_record(file, problem, result)) return 1;
                ++num_records;
                num_outputs += result.size();
            }
        }
    }
    cudaDeviceProp properties;
    if (!succeeded(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties")) return 1;
    if (fclose(file) != 0) return 1;
    printf("%s: %d records, %zu outputs on %s (compute capability %d.%d)\n", argv[1], num_records,
           num_outputs, properties.name, properties.major, properties.minor);
    return 0;
}
