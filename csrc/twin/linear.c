// linear.c -- y = x Wᵀ as the tensor cores compute it: chains of k16 steps in chunks.
//
//   chunk_j = chain of steps over k in [j KC, (j+1) KC) from zero;  y = (chunk_0 + chunk_1) + chunk_2 ..
//
// Shapes    x [num_tokens, in_features], weight [out_features, in_features] packed,
//           out [num_tokens, out_features]
// Rounding  the step's cuts; chunk sums in float32; to bf16 at the end, but not for logits
// Mapping   one task per 32 tokens and 64 outputs; which thread takes it does not matter
// Source    docs/numerics.md section 2
// See       kernels/linear_*.cu, tests/twin/test_linear.py

#include "packed_matrix.h"
#include "threads.h"

enum {
    TASK_TOKENS = 32,
    TASK_PANELS = 4,
    TASK_OUTPUTS = TASK_PANELS * PANEL_LANES,
};

typedef struct LinearArguments {
    void *out;  // bf16 or float32
    int out_is_float32;
    const bf16 *x;
    const Matrix *weight;
    int num_tokens;
    int num_output_tasks;
} LinearArguments;

typedef struct LinearScratch {
    float x_value[TASK_TOKENS][NUMERICS_CHUNK];
    int32_t x_exponent[TASK_TOKENS][NUMERICS_CHUNK];
    float sum[TASK_TOKENS][TASK_OUTPUTS];
    float chunk[TASK_TOKENS][TASK_OUTPUTS];
    Panel panel;
} LinearScratch;

_Static_assert(sizeof(LinearScratch) <= TWIN_SCRATCH_BYTES, "a task's scratch must fit a thread's");

// The chain of one chunk for all tokens and outputs of the task, from zero, k ascending.
static void chunk_sums(LinearScratch *s, const LinearArguments *args, int first_token, int num_tokens,
                       int first_output, int num_outputs, int first_k, int num_k) {
    const Matrix *weight = args->weight;
    for (int token = 0; token < num_tokens; token++) {
        const bf16 *x = args->x + (size_t)(first_token + token) * weight->cols + first_k;
        tensor_core_decode(s->x_value[token], s->x_exponent[token], x, num_k);
    }
    memset(s->chunk, 0, sizeof s->chunk);
    for (int output = 0; output < num_outputs; output += PANEL_LANES) {
        for (int k = 0; k < num_k; k += NUMERICS_STEP) {
            const bf16 *packed = packed_element(weight, first_output + output, first_k + k);
            tensor_core_decode_panel(&s->panel, packed, PANEL_LANES, 1);
            tensor_core_step_rows(&s->chunk[0][output], TASK_OUTPUTS, &s->x_value[0][k],
                                  &s->x_exponent[0][k], NUMERICS_CHUNK, num_tokens, &s->panel);
        }
    }
}

static void linear_task(const void *arguments, int64_t index, void *scratch) {
    const LinearArguments *args = arguments;
    LinearScratch *s = scratch;
    const Matrix *weight = args->weight;
    int first_token = (int)(index / args->num_output_tasks) * TASK_TOKENS;
    int first_output = (int)(index % args->num_output_tasks) * TASK_OUTPUTS;
    int num_tokens =
        args->num_tokens - first_token < TASK_TOKENS ? args->num_tokens - first_token : TASK_TOKENS;
    int num_outputs =
        weight->rows - first_output < TASK_OUTPUTS ? weight->rows - first_output : TASK_OUTPUTS;

    for (int first_k = 0; first_k < weight->cols; first_k += NUMERICS_CHUNK) {
        int num_k = weight->cols - first_k < NUMERICS_CHUNK ? weight->cols - first_k : NUMERICS_CHUNK;
        chunk_sums(s, args, first_token, num_tokens, first_output, num_outputs, first_k, num_k);
        for (int token = 0; token < num_tokens; token++)
            for (int output = 0; output < num_outputs; output++)
                s->sum[token][output] = first_k == 0 ? s->chunk[token][output]
                                                     : s->sum[token][output] + s->chunk[token][output];
    }
    for (int token = 0; token < num_tokens; token++) {
        size_t row = (size_t)(first_token + token) * weight->rows + first_output;
        for (int output = 0; output < num_outputs; output++) {
            if (args->out_is_float32)
                ((float *)args->out)[row + output] = s->sum[token][output];
            else
                ((bf16 *)args->out)[row + output] = bf16_from_float(s->sum[token][output]);
        }
    }
}

static void run(void *out, int out_is_float32, const bf16 *x, const Matrix *weight, int num_tokens,
                Stream stream) {
    int num_output_tasks = (weight->rows + TASK_OUTPUTS - 1) / TASK_OUTPUTS;
    int num_token_tasks = (num_tokens + TASK_TOKENS - 1) / TASK_TOKENS;
    LinearArguments arguments = {out, out_is_float32, x, weight, num_tokens, num_output_tasks};
    parallel_for(stream, (int64_t)num_output_tasks * num_token_tasks, linear_task, &arguments);
}

Status twin_linear(bf16 *out, const bf16 *x, const Matrix *weight, int num_tokens, Stream stream) {
    run(out, 0, x, weight, num_tokens, stream);
    return STATUS_OK;
}

Status twin_linear_f32(float *out, const bf16 *x, const Matrix *weight, int num_tokens, Stream stream) {
    run(out, 1, x, weight, num_tokens, stream);
    return STATUS_OK;
}
