// ops_sampling.c -- the part of ops.h that chooses tokens.

#include <stdlib.h>
#include "batch.h"
#include "op_context.h"

// The checks of a step's sampling, with a scratch of their own.
static Status check_sampling(const EngineSampling *sampling, int num_rows, int vocab_size) {
    TRY(check_positive("num_rows", num_rows));
    TRY(check_positive("vocab_size", vocab_size));
    uint8_t *edited_by = calloc(1, (size_t)vocab_size);
    if (!edited_by) return fail(STATUS_OUT_OF_MEMORY, "%d bytes of host memory", vocab_size);
    Status status = sampling_check(sampling, num_rows, vocab_size, edited_by);
    free(edited_by);
    return status;
}

// A call's sampling task and logits in the backend's memory; the host's part is given back by room_free.
typedef struct Prepared {
    SamplingRoom room;
    SamplingTask task;
    Chosen chosen;
    float *logits;
} Prepared;

static void prepared_free(Prepared *p) {
    free(p->room.host_staged);
    free(p->room.host_scores);
}

static Status prepare(Prepared *p, Buffers *b, const float *logits, const EngineSampling *sampling,
                      int num_rows, int vocab_size) {
    TRY(check_sampling(sampling, num_rows, vocab_size));
    SamplingSizes sizes = sampling_sizes(num_rows, vocab_size);
    SamplingRoom *room = &p->room;
    room->max_edits = sizes.max_edits;
    room->host_staged = malloc(sizes.staged);
    room->host_scores = calloc(1, sizes.scores);
    if (!room->host_staged || !room->host_scores)
        return fail(STATUS_OUT_OF_MEMORY, "%zu bytes of host memory", sizes.staged + sizes.scores);
    TRY(output(b, &room->staged, sizes.staged));
    TRY(output(b, &room->saved, sizes.saved));
    TRY(input(b, &room->scores, room->host_scores, sizes.scores));  // they come back whole
    p->task = (SamplingTask){.kernels = b->context->kernels,
                             .stream = b->context->stream,
                             .room = room,
                             .sampling = sampling,
                             .vocab_size = vocab_size,
                             .chosen = &p->chosen};
    TRY(output(b, &p->task.ids, num_rows * sizeof(int32_t)));
    return input(b, &p->logits, logits, (size_t)num_rows * vocab_size * sizeof(float));
}

Status op_sample(OpContext *context, int32_t *ids, const float *logits, const EngineSampling *sampling,
                 const uint64_t *uniforms, int32_t num_rows, int32_t vocab_size) {
    TRY(check_pointers(context, ids, logits, sampling));
    SCOPED_BUFFERS(b, context);
    Prepared p __attribute__((cleanup(prepared_free))) = {.logits = NULL};
    TRY(prepare(&p, &b, logits, sampling, num_rows, vocab_size));
    p.task.uniforms = uniforms;
    TRY(choose_tokens(&p.task, p.logits, 0, num_rows, ids));
    return collect_tokens(&p.task);
}

Status op_edit_logits(OpContext *context, float *out, const float *logits, const EngineSampling *sampling,
                      int32_t num_rows, int32_t vocab_size) {
    TRY(check_pointers(context, out, logits, sampling));
    SCOPED_BUFFERS(b, context);
    Prepared p __attribute__((cleanup(prepared_free))) = {.logits = NULL};
    TRY(prepare(&p, &b, logits, sampling, num_rows, vocab_size));
    for (int row = 0; row < num_rows; row++) {
        const SampleRow *rows;
        const LogitEdit *device_edits;
        int num_edits;
        TRY(stage_sampling(&p.task, row, 1, &rows, &device_edits, &num_edits));
        if (num_edits)
            TRY(context->kernels->edit_logits(p.logits + (size_t)row * vocab_size, p.room.saved,
                                              device_edits, rows, num_edits, vocab_size, context->stream));
    }
    return fetch(&b, out, p.logits, (size_t)num_rows * vocab_size * sizeof(float));
}

Status op_uniform(OpContext *context, uint64_t *out, const uint64_t *seeds, const int32_t *positions,
                  const int32_t *choices, int64_t n) {
    TRY(check_pointers(context, out, seeds, positions));
    TRY(check_pointers(context, out, choices, choices));
    TRY(check_positive("n", n));
    for (int64_t i = 0; i < n; i++) out[i] = uniform_of(seeds[i], positions[i], choices[i]);
    return STATUS_OK;
}
