// sample.c -- from a step's logits to its tokens and their scores: the request's numbers into the kernels'
// terms, then edit, arg-max, sample, restore, score.
//
// Source    docs/numerics.md section 8
// See       kernels/sample.cu, twin/sample.c, tests/twin/test_sample.py

#include <math.h>
#include "../common/numerics.h"
#include "model.h"

enum { MIN_EDITS = 1 << 16 };  // room for the edits of many rows at once; a row has vocab_size at most

SamplingSizes sampling_sizes(int max_rows, int vocab_size) {
    size_t max_edits = vocab_size > MIN_EDITS ? (size_t)vocab_size : MIN_EDITS;
    return (SamplingSizes){
        .max_edits = (int)max_edits,
        .staged = max_rows * sizeof(SampleRow) + max_edits * sizeof(LogitEdit),
        .saved = max_edits * sizeof(float),
        .scores = max_rows * sizeof(TokenScore),
    };
}

static SampleRow row_of(const EngineSamplingRow *row, const uint64_t *uniform) {
    return (SampleRow){
        .uniform = uniform ? *uniform : uniform_of(row->seed, row->position, row->choice),
        .top_p = row->top_p < 1.0f ? (uint64_t)ldexp(row->top_p, 64) : 0,
        .scale = row->temperature > 0.0f ? (float)(1.4426950408889634 / (double)row->temperature) : 0.0f,
        .min_p = row->min_p,
        .top_k = row->top_k,
        .repetition_penalty = row->repetition_penalty,
        .presence_penalty = row->presence_penalty,
        .frequency_penalty = row->frequency_penalty,
        .num_logprobs = row->num_logprobs,
        .scored_id = row->scored_id,
    };
}

// How many rows from `first` on have room for their edits together: at least one.
static int rows_that_fit(const EngineSampling *sampling, int max_edits, int first, int num_rows) {
    int count = 0;
    for (int64_t edits = 0; count < num_rows; count++) {
        edits += sampling->rows[first + count].num_edits;
        if (edits > max_edits) break;
    }
    return count;
}

Status stage_sampling(const SamplingTask *task, int first, int num_rows, const SampleRow **rows,
                      const LogitEdit **device_edits, int *num_edits) {
    const SamplingRoom *room = task->room;
    SampleRow *host_rows = room->host_staged;
    LogitEdit *host_edits = (LogitEdit *)(host_rows + num_rows);
    int count = 0;
    for (int i = 0; i < num_rows; i++) {
        const EngineSamplingRow *row = &task->sampling->rows[first + i];
        host_rows[i] = row_of(row, task->uniforms ? &task->uniforms[first + i] : NULL);
        const EngineLogitEdit *edit = task->sampling->edits + row->first_edit;
        for (int end = count + row->num_edits; count < end; count++, edit++)
            host_edits[count] = (LogitEdit){i, edit->token_id, edit->count, edit->bias, edit->flags};
    }
    *rows = room->staged;
    *device_edits = (const LogitEdit *)(*rows + num_rows);
    *num_edits = count;
    size_t bytes = num_rows * sizeof(SampleRow) + count * sizeof(LogitEdit);
    return task->kernels->copy_in(room->staged, room->host_staged, bytes, task->stream);
}

// ln p of a logit, from the integer mass: the logarithm in float64, rounded once.
static float logprob_of(const TokenScore *score, float logit) {
    if (score->mass == 0) return NAN;
    double log_mass = log(ldexp((double)score->mass, -NUMERICS_WEIGHT_BITS));
    return (float)((double)logit - (double)score->largest - log_mass);
}

static void report(const EngineSampling *s, int row, const TokenScore *score) {
    int num_logprobs = s->rows[row].num_logprobs;
    if (num_logprobs < 0) return;
    s->token_logprobs[row] = logprob_of(score, score->logit);
    s->token_ranks[row] = score->rank;
    for (int i = 0; i < num_logprobs && score->top_ids[i] >= 0; i++) {
        size_t place = (size_t)row * s->max_logprobs + i;
        s->top_ids[place] = score->top_ids[i];
        s->top_logprobs[place] = logprob_of(score, score->top_logits[i]);
    }
}

Status collect_tokens(const SamplingTask *t) {
    const SamplingRoom *room = t->room;
    Chosen chosen = *t->chosen;
    *t->chosen = (Chosen){.num_rows = 0};
    if (chosen.is_scored) {
        TRY(t->kernels->copy_out(room->host_scores, room->scores, chosen.num_rows * sizeof(TokenScore),
                                 t->stream));
        for (int i = 0; i < chosen.num_rows; i++)
            report(chosen.sampling, chosen.first + i, &room->host_scores[i]);
    }
    if (!chosen.next_ids) return STATUS_OK;
    return t->kernels->copy_out(chosen.next_ids, t->ids, chosen.num_rows * sizeof(int32_t), t->stream);
}

static Status choose_some(const SamplingTask *t, float *logits, int first, int num_rows,
                          int32_t *next_ids) {
    const Kernels *k = t->kernels;
    const SamplingRoom *room = t->room;
    const SampleRow *rows;
    const LogitEdit *device_edits;
    int num_edits, is_scored = 0;
    for (int i = 0; i < num_rows; i++) is_scored |= t->sampling->rows[first + i].num_logprobs >= 0;
    TRY(collect_tokens(t));
    TRY(stage_sampling(t, first, num_rows, &rows, &device_edits, &num_edits));
    if (num_edits)
        TRY(k->edit_logits(logits, room->saved, device_edits, rows, num_edits, t->vocab_size, t->stream));
    TRY(k->argmax(t->ids, logits, num_rows, t->vocab_size, t->stream));
    TRY(k->sample(t->ids, logits, rows, num_rows, t->vocab_size, t->stream));
    if (num_edits)
        TRY(k->restore_logits(logits, room->saved, device_edits, num_edits, t->vocab_size, t->stream));
    if (is_scored)
        TRY(k->score_tokens(room->scores, logits, t->ids, rows, num_rows, t->vocab_size, t->stream));
    *t->chosen = (Chosen){first, num_rows, is_scored, t->sampling, next_ids};
    return STATUS_OK;
}

Status choose_tokens(const SamplingTask *task, float *logits, int first, int num_rows, int32_t *next_ids) {
    for (int row = first, end = first + num_rows; row < end;) {
        int count = rows_that_fit(task->sampling, task->room->max_edits, row, end - row);
        TRY(choose_some(task, logits + (size_t)(row - first) * task->vocab_size, row, count,
                        next_ids ? next_ids + (row - first) : NULL));
        row += count;
    }
    return STATUS_OK;
}

static SamplingTask task_of(Model *model, const EngineSampling *sampling) {
    return (SamplingTask){.kernels = model->kernels,
                          .stream = model->stream,
                          .room = &model->sampling,
                          .sampling = sampling,
                          .ids = model->activations.next_ids,
                          .vocab_size = model->config.vocab_size,
                          .chosen = &model->chosen};
}

Status model_choose(Model *model, const EngineSampling *sampling, int first, int num_rows,
                    int32_t *next_ids) {
    const Kernels *k = model->kernels;
    Activations *a = &model->activations;
    SamplingTask task = task_of(model, sampling);
    if (sampling) return choose_tokens(&task, a->logits, first, num_rows, next_ids);
    if (!next_ids) return STATUS_OK;
    TRY(collect_tokens(&task));
    TRY(k->argmax(a->next_ids, a->logits, num_rows, model->config.vocab_size, model->stream));
    model->chosen = (Chosen){.first = first, .num_rows = num_rows, .next_ids = next_ids};
    return STATUS_OK;
}

Status model_collect(Model *model) {
    SamplingTask task = task_of(model, NULL);
    TRY(collect_tokens(&task));
    return model->kernels->synchronize(model->stream);
}
