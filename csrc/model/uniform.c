// uniform.c -- the random number of a draw: Philox4x32-10 keyed by the request's seed, counted by position.
//
// Nothing else enters, so a request draws the same numbers in any batch, on any schedule, after any pause.
//
// Source    Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011; docs/numerics.md section 8
// See       tests/twin/test_sample.py

#include "model.h"

enum { ROUNDS = 10 };

uint64_t uniform_of(uint64_t seed, int32_t position, int32_t choice) {
    uint32_t counter[4] = {(uint32_t)position, (uint32_t)choice, 0, 0};
    uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    for (int round = 0; round < ROUNDS; round++) {
        uint64_t first = (uint64_t)counter[0] * 0xD2511F53u, second = (uint64_t)counter[2] * 0xCD9E8D57u;
        counter[0] = (uint32_t)(second >> 32) ^ counter[1] ^ key[0];
        counter[1] = (uint32_t)second;
        counter[2] = (uint32_t)(first >> 32) ^ counter[3] ^ key[1];
        counter[3] = (uint32_t)first;
        key[0] += 0x9E3779B9u;
        key[1] += 0xBB67AE85u;
    }
    return (uint64_t)counter[1] << 32 | counter[0];
}
