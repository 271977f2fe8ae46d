// threads.h -- the twin's stream: a pool of threads that share out independent tasks, a scratch for each.
//
// Which thread runs a task never enters a result: every task writes only its own outputs.

#pragma once
#include <stddef.h>
#include "../kernels/kernels.h"

enum { TWIN_SCRATCH_BYTES = 1 << 20 };  // per thread; attention's tile is the largest user

// Task `index` of `count`; `scratch` is TWIN_SCRATCH_BYTES, 64-byte aligned, contents undefined.
typedef void Task(const void *arguments, int64_t index, void *scratch);

void parallel_for(Stream stream, int64_t count, Task *task, const void *arguments);
