// threads.c -- a fixed pool: workers sleep until a loop is posted, take its indices one by one.

#define _GNU_SOURCE
#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct StreamImpl {
    pthread_mutex_t mutex;
    pthread_cond_t posted;    // a loop is there, or the pool closes
    pthread_cond_t finished;  // the last worker left the loop
    int num_workers;          // threads beside the caller
    int num_busy;             // workers that have not left the current loop
    unsigned loop_number;
    bool closing;
    Task *task;
    const void *arguments;
    int64_t count;
    atomic_llong next;
    pthread_t *workers;
    char *scratch;  // [num_workers + 1][TWIN_SCRATCH_BYTES]; the caller's is the last
} ThreadPool;

typedef struct WorkerStart {
    ThreadPool *pool;
    int index;
} WorkerStart;

static void take_tasks(ThreadPool *pool, int thread) {
    void *scratch = pool->scratch + (size_t)thread * TWIN_SCRATCH_BYTES;
    for (;;) {
        int64_t index = atomic_fetch_add(&pool->next, 1);
        if (index >= pool->count) return;
        pool->task(pool->arguments, index, scratch);
    }
}

static void *worker_main(void *argument) {
    WorkerStart start = *(WorkerStart *)argument;
    free(argument);
    ThreadPool *pool = start.pool;
    unsigned seen = 0;
    pthread_mutex_lock(&pool->mutex);
    for (;;) {
        while (!pool->closing && pool->loop_number == seen) pthread_cond_wait(&pool->posted, &pool->mutex);
        if (pool->closing) break;
        seen = pool->loop_number;
        pthread_mutex_unlock(&pool->mutex);
        take_tasks(pool, start.index);
        pthread_mutex_lock(&pool->mutex);
        if (--pool->num_busy == 0) pthread_cond_signal(&pool->finished);
    }
    pthread_mutex_unlock(&pool->mutex);
    return NULL;
}

void parallel_for(Stream stream, int64_t count, Task *task, const void *arguments) {
    ThreadPool *pool = stream;
    pool->task = task;
    pool->arguments = arguments;
    pool->count = count;
    atomic_store(&pool->next, 0);
    bool shared = pool->num_workers > 0 && count > 1;
    if (shared) {
        pthread_mutex_lock(&pool->mutex);
        pool->num_busy = pool->num_workers;
        pool->loop_number++;
        pthread_cond_broadcast(&pool->posted);
        pthread_mutex_unlock(&pool->mutex);
    }
    take_tasks(pool, pool->num_workers);
    if (shared) {
        pthread_mutex_lock(&pool->mutex);
        while (pool->num_busy > 0) pthread_cond_wait(&pool->finished, &pool->mutex);
        pthread_mutex_unlock(&pool->mutex);
    }
}

// Cores that this process may use: a process bound to some of them gains nothing from more threads.
static int num_cores(void) {
    cpu_set_t cores;
    if (sched_getaffinity(0, sizeof cores, &cores) == 0) return CPU_COUNT(&cores);
    long online = sysconf(_SC_NPROCESSORS_ONLN);
    return online < 1 ? 1 : (int)online;
}

Status twin_open_stream(Stream *stream, int num_threads) {
    if (num_threads == 0) num_threads = num_cores();
    ThreadPool *pool = calloc(1, sizeof *pool);
    size_t scratch_bytes = (size_t)num_threads * TWIN_SCRATCH_BYTES;
    if (pool) {
        pool->workers = calloc((size_t)num_threads, sizeof *pool->workers);
        pool->scratch = aligned_alloc(64, scratch_bytes);
    }
    if (!pool || !pool->workers || !pool->scratch) {
        if (pool) free(pool->workers), free(pool->scratch);
        free(pool);
        return fail(STATUS_OUT_OF_MEMORY, "%zu bytes for %d threads' scratch", scratch_bytes, num_threads);
    }
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->posted, NULL);
    pthread_cond_init(&pool->finished, NULL);
    for (int i = 0; i + 1 < num_threads; i++) {
        WorkerStart *start = malloc(sizeof *start);
        if (start) *start = (WorkerStart){pool, i};
        if (!start || pthread_create(&pool->workers[i], NULL, worker_main, start) != 0) {
            free(start);
            twin_close_stream(pool);
            return fail(STATUS_OUT_OF_MEMORY, "thread %d of %d could not be started", i + 1, num_threads);
        }
        pool->num_workers++;
    }
    *stream = pool;
    return STATUS_OK;
}

void twin_close_stream(Stream stream) {
    ThreadPool *pool = stream;
    if (!pool) return;
    pthread_mutex_lock(&pool->mutex);
    pool->closing = true;
    pthread_cond_broadcast(&pool->posted);
    pthread_mutex_unlock(&pool->mutex);
    for (int i = 0; i < pool->num_workers; i++) pthread_join(pool->workers[i], NULL);
    pthread_cond_destroy(&pool->finished);
    pthread_cond_destroy(&pool->posted);
    pthread_mutex_destroy(&pool->mutex);
    free(pool->workers);
    free(pool->scratch);
    free(pool);
}
