// weights.h -- which tensors a model needs, under which names and shapes, and where each goes.

#pragma once
#include "../model/model.h"

typedef struct WeightSlot {
    char name[96];
    int rows;  // a vector has one row
    int cols;
    Matrix *matrix;  // exactly one of these two is set
    bf16 **vector;
    int is_loaded;
} WeightSlot;

int weight_slots_count(const EngineModelConfig *config);
// Fills slots [weight_slots_count] for a model whose weights.layers is allocated.
void weight_slots_fill(WeightSlot *slots, Model *model);
