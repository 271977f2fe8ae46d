// limits.c -- what an engine can be asked to be.

#include <limits.h>
#include "../common/numerics.h"
#include "engine_state.h"

Status check_config(const EngineModelConfig *c) {
    struct {
        const char *name;
        int64_t value, low, high, multiple;
    } fields[] = {
        {"vocab_size", c->vocab_size, 1, 1 << 24, 1},
        {"hidden_size", c->hidden_size, 64, 1 << 16, 64},
        {"intermediate_size", c->intermediate_size, 64, 1 << 18, 64},
        {"num_layers", c->num_layers, 1, 1024, 1},
        {"num_kv_heads", c->num_kv_heads, 1, 1024, 1},
        {"num_heads", c->num_heads, 1, 1024, 1},
        {"head_dim", c->head_dim, 64, 64, 1},
        {"tie_word_embeddings", c->tie_word_embeddings, 0, 1, 1},
        {"rope_type", c->rope_type, ROPE_DEFAULT, ROPE_LLAMA3, 1},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++) {
        int64_t value = fields[i].value;
        if (value < fields[i].low || value > fields[i].high || value % fields[i].multiple)
            return fail(STATUS_INVALID_ARGUMENT, "%s is %lld, must be %lld .. %lld and a multiple of %lld",
                        fields[i].name, (long long)value, (long long)fields[i].low,
                        (long long)fields[i].high, (long long)fields[i].multiple);
    }
    if (c->num_heads % c->num_kv_heads || c->num_heads / c->num_kv_heads > 32)
        return fail(STATUS_INVALID_ARGUMENT, "num_heads is %d, must be 1 .. 32 times num_kv_heads (%d)",
                    c->num_heads, c->num_kv_heads);
    if (!(c->rms_norm_eps >= 0.0f && c->rms_norm_eps <= 1.0f))
        return fail(STATUS_INVALID_ARGUMENT, "rms_norm_eps is %g, must be 0 .. 1", (double)c->rms_norm_eps);
    if (!(c->rope_theta > 0.0 && c->rope_theta < 1e12))
        return fail(STATUS_INVALID_ARGUMENT, "rope_theta is %g, must be above 0 and below 1e12",
                    c->rope_theta);
    if (c->rope_type == ROPE_LLAMA3 && !(c->rope_factor >= 1.0 && c->rope_low_freq_factor > 0.0 &&
                                         c->rope_high_freq_factor > c->rope_low_freq_factor &&
                                         c->rope_original_max_position_embeddings > 0))
        return fail(STATUS_INVALID_ARGUMENT,
                    "llama3 rope scaling: factor %g must be >= 1, low_freq_factor %g > 0 and below "
                    "high_freq_factor "
                    "%g, original_max_position_embeddings %d > 0",
                    c->rope_factor, c->rope_low_freq_factor, c->rope_high_freq_factor,
                    c->rope_original_max_position_embeddings);
    return STATUS_OK;
}

Status check_options(const EngineOptions *o) {
    struct {
        const char *name;
        int64_t value, low, high;
    } fields[] = {
        {"device", o->device, DEVICE_CPU, DEVICE_CUDA}, {"num_threads", o->num_threads, 0, 1024},
        {"block_size", o->block_size, 16, 128},         {"num_blocks", o->num_blocks, 1, INT_MAX / 128},
        {"max_seq_len", o->max_seq_len, 1, 1 << 24},    {"max_num_tokens", o->max_num_tokens, 1, 1 << 20},
        {"max_num_seqs", o->max_num_seqs, 1, 1 << 16},  {"enforce_eager", o->enforce_eager, 0, 1},
    };
    for (size_t i = 0; i < sizeof fields / sizeof fields[0]; i++)
        if (fields[i].value < fields[i].low || fields[i].value > fields[i].high)
            return fail(STATUS_INVALID_ARGUMENT, "%s is %lld, must be %lld .. %lld", fields[i].name,
                        (long long)fields[i].value, (long long)fields[i].low, (long long)fields[i].high);
    if (NUMERICS_TILE % o->block_size)
        return fail(STATUS_INVALID_ARGUMENT, "block_size is %d, must be 16, 32, 64 or 128", o->block_size);
    return STATUS_OK;
}
