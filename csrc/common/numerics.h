// numerics.h -- the constants of docs/numerics.md, for C and CUDA; whoever changes one raises the version.

#pragma once

static inline const char *numerics_version(void) {
    return "hopper.k512.t128.g8.1";
}

enum {
    NUMERICS_CHUNK = 512,       // KC: reduction length of one accumulator chain of a linear layer
    NUMERICS_TILE = 128,        // T: keys of an attention tile
    NUMERICS_SEGMENT = 8,       // G: tiles of an attention segment
    NUMERICS_STEP = 16,         // products of one tensor-core step
    NUMERICS_NORM_LANES = 256,  // lanes of RMSNorm's sum, each taking NUMERICS_NORM_RUN consecutive values
    NUMERICS_NORM_RUN = 8,
    NUMERICS_WEIGHT_BITS = 38,  // a token's weight is its exp2 in units of 2^-38; 2^24 of them fit 64 bits
};

// exp2's polynomial 1 + c1 f + ... + c6 f^6 on [-0.5, 0.5] as float32 bits: the relative minimax fit with
// the constant fixed at 1, coefficients rounded one after another and the rest fitted again. Largest
// relative error of the whole, evaluated in float32: 1.14 * 2^-24.
enum {
    EXP2_C0 = 0x3f800000,
    EXP2_C1 = 0x3f317218,
    EXP2_C2 = 0x3e75fdee,
    EXP2_C3 = 0x3d6357be,
    EXP2_C4 = 0x3c1d96f0,
    EXP2_C5 = 0x3aaf8417,
    EXP2_C6 = 0x3920b5a9,
    LOG2_E = 0x3fb8aa3b,  // float32(log2(e))
};
