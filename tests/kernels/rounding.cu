// rounding.cu -- tries every input of the two approximations that are only wanted rounded to bf16.
//
// Prints, of exp2 over all 2^32 float32 and of silu over all 65536 bf16 gates, as JSON:
//   over, under    ULPs by which the exact value lies above and below the approximation, at most
//   unlike         values of which one is zero, infinite, NaN or negative and the other is not
//   near           values that TieWatch holds to be near a tie
//   wrong          values of another bf16 than the contract's, near a tie or not
//   wrong_unseen   those that are not near one
//
// See       csrc/common/rounding.cuh, tests/kernels/test_rounding.py

#include <stdio.h>

#include "../../csrc/common/exp2.cuh"
#include "../../csrc/common/rounding.cuh"
#include "../../csrc/kernels/silu.cuh"

constexpr int kThreads = 256;
constexpr int kBlocks = 4096;
constexpr uint32_t kMagnitude = 0x7fffffffu;

struct Counts {
    int over;
    int under;
    unsigned long long unlike;
    unsigned long long near;
    unsigned long long wrong;
    unsigned long long wrong_unseen;
};

struct Exp2 {
    static constexpr uint64_t kInputs = 1ull << 32;
    using Watch = TieWatch<kExp2Over, kExp2Under>;
    static __device__ float input(uint64_t i) { return __uint_as_float((uint32_t)i); }
    static __device__ float approximate(float x) { return approximate_exp2(x); }
    static __device__ float exact(float x) { return contract_exp2(x); }
};

struct Silu {
    static constexpr uint64_t kInputs = 1ull << 16;
    using Watch = TieWatch<0, 0>;
    static __device__ float input(uint64_t i) { return to_float((uint16_t)i); }
    static __device__ float approximate(float x) { return approximate_silu(x); }
    static __device__ float exact(float x) {
        return __fdiv_rn(x, __fadd_rn(1.0f, contract_exp2(__fmul_rn(-x, __int_as_float(LOG2_E)))));
    }
};

static __device__ bool is_ordinary(float x) {
    return x != 0.0f && fabsf(x) < __builtin_huge_valf();
}

// Seen beside a value that is near no tie, in either half.
template <typename Watch>
static __device__ bool is_near(float x) {
    Watch low, high;
    low.see(x, 1.0f);
    high.see(1.0f, x);
    if (low.is_near_tie() != high.is_near_tie()) asm("trap;");
    return low.is_near_tie();
}

template <typename Function>
static __global__ void try_all(Counts *counts) {
    Counts own = {};
    for (uint64_t i = (uint64_t)blockIdx.x * kThreads + threadIdx.x; i < Function::kInputs;
         i += (uint64_t)kBlocks * kThreads) {
        float x = Function::input(i), approximate = Function::approximate(x), exact = Function::exact(x);
        uint32_t bits = __float_as_uint(approximate), exact_bits = __float_as_uint(exact);
        if (is_ordinary(approximate) && is_ordinary(exact) && (bits ^ exact_bits) <= kMagnitude) {
            int above = (int)((exact_bits & kMagnitude) - (bits & kMagnitude));
            own.over = max(own.over, above);
            own.under = max(own.under, -above);
        } else if (bits != exact_bits && !(approximate != approximate && exact != exact)) {
            own.unlike += 1;
        }
        bool near = is_near<typename Function::Watch>(approximate);
        bool differs = to_bf16(approximate) != to_bf16(exact);
        own.near += near;
        own.wrong += differs;
        own.wrong_unseen += differs && !near;
    }
    atomicMax(&counts->over, own.over);
    atomicMax(&counts->under, own.under);
    atomicAdd(&counts->unlike, own.unlike);
    atomicAdd(&counts->near, own.near);
    atomicAdd(&counts->wrong, own.wrong);
    atomicAdd(&counts->wrong_unseen, own.wrong_unseen);
}

template <typename Function>
static bool report(const char *name, const char *end) {
    Counts *counts, found;
    if (cudaMalloc(&counts, sizeof found) != cudaSuccess) return false;
    if (cudaMemset(counts, 0, sizeof found) != cudaSuccess) return false;
    try_all<Function><<<kBlocks, kThreads>>>(counts);
    if (cudaGetLastError() != cudaSuccess) return false;
    if (cudaMemcpy(&found, counts, sizeof found, cudaMemcpyDeviceToHost) != cudaSuccess) return false;
    printf(
        "\"%s\": {\"over\": %d, \"under\": %d, \"unlike\": %llu, \"near\": %llu, \"wrong\": %llu, "
        "\"wrong_unseen\": %llu}%s",
        name, found.over, found.under, found.unlike, found.near, found.wrong, found.wrong_unseen, end);
    return cudaFree(counts) == cudaSuccess;
}

int main() {
    printf("{");
    bool is_ok = report<Exp2>("exp2", ", ") && report<Silu>("silu", "}\n");
    return is_ok ? 0 : 1;
}
