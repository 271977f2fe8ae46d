// model.h -- the model on one page: its weights, its activations and its cache, each with its shape.

#pragma once
#include "../kernels/kernels.h"

// One decoder layer; names as in the checkpoint, after model.layers.{i}.
typedef struct LayerWeights {
    bf16 *input_layernorm;           // [hidden_size]
    Matrix q_proj;                   // [num_heads * head_dim, hidden_size]
    Matrix k_proj;                   // [num_kv_heads * head_dim, hidden_size]
    Matrix v_proj;                   // [num_kv_heads * head_dim, hidden_size]
    Matrix o_proj;                   // [hidden_size, num_heads * head_dim]
    bf16 *post_attention_layernorm;  // [hidden_size]
    Matrix gate_proj;                // [intermediate_size, hidden_size]
    Matrix up_proj;                  // [intermediate_size, hidden_size]
    Matrix down_proj;                // [hidden_size, intermediate_size]
} LayerWeights;

typedef struct Weights {
    Matrix embed_tokens;   // [vocab_size, hidden_size]
    LayerWeights *layers;  // [num_layers]
    bf16 *norm;            // [hidden_size]
    Matrix lm_head;        // [vocab_size, hidden_size]; the embedding's memory when tied
    bf16 *rope_table;      // [max_seq_len, head_dim]: cos | sin
} Weights;

// What a step writes; sized once for the largest step.
typedef struct Activations {
    bf16 *residual;     // [max_num_tokens, hidden_size]
    bf16 *normed;       // [max_num_tokens, hidden_size]
    bf16 *q;            // [max_num_tokens, num_heads, head_dim]
    bf16 *k;            // [max_num_tokens, num_kv_heads, head_dim]
    bf16 *v;            // [max_num_tokens, num_kv_heads, head_dim]
    bf16 *attn;         // [max_num_tokens, num_heads, head_dim]
    bf16 *projected;    // [max_num_tokens, hidden_size]: o's and down's output
    bf16 *gate;         // [max_num_tokens, intermediate_size]
    bf16 *up;           // [max_num_tokens, intermediate_size]
    bf16 *act;          // [max_num_tokens, intermediate_size]
    float *logits;      // [logits_rows, vocab_size]
    int32_t *next_ids;  // [logits_rows]
    int logits_rows;    // rows of logits computed at a time
} Activations;

typedef struct Model {
    EngineModelConfig config;
    const Kernels *kernels;
    Stream stream;
    Weights weights;
    Activations activations;
    KvLayer *cache;        // [num_layers]
    DecodeProblem decode;  // for the backend's fused step; workspace is null where it has none
} Model;

// Where the forward pass shows its values (runtime/tap.c); null members do nothing.
typedef struct TapSet {
    const EngineTap *taps;
    int num_taps;
} TapSet;

// Rows first_row .. first_row + num_rows - 1 of a tap's [.., width] value.
Status tap_rows(const Model *model, const TapSet *set, TapPoint point, int layer, void *value,
                int first_row, int num_rows);
int tap_width(const EngineModelConfig *config, TapPoint point);
int tap_value_size(TapPoint point);  // bytes

// The table of cos and sin, bf16 [max_positions, head_dim], on the host.
Status rope_table_fill(bf16 *table, const EngineModelConfig *config, int max_positions);

// The fused step: whether it can take this batch, and one or several greedy steps with it. `next_ids` is
// [num_steps, num_seqs] on the host, or null. The batch's arrays advance in place; `steps_before` are
// already done.
int decode_applies(const Model *model, const BatchIndex *batch);
Status decode_forward(Model *model, const BatchIndex *batch, int steps_before, int num_steps, float *logits,
                      int32_t *next_ids);

// One step: fills host arrays logits [num_logits, vocab_size] and next_ids [num_logits], either may be
// null.
Status model_forward(Model *model, const BatchIndex *batch, const TapSet *taps, float *logits,
                     int32_t *next_ids);
