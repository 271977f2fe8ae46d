// fail_nth_allocation.c -- the linker's --wrap sends every allocation of the library through here.
//
// Counts what is given out and what comes back, and refuses the n-th request on demand. Linked into a
// library built for tests only (tests/runtime/test_out_of_memory.py); the real one never sees it.

#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdlib.h>

#define EXPORT __attribute__((visibility("default")))

void *__real_malloc(size_t size);
void *__real_calloc(size_t count, size_t size);
void *__real_aligned_alloc(size_t alignment, size_t size);
int __real_posix_memalign(void **memory, size_t alignment, size_t size);
void __real_free(void *memory);
int __real_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                          void *argument);

static atomic_long requests;  // since fail_allocation was last called
static atomic_long fail_at;   // the request to refuse, from 1; 0: none
static atomic_long live;      // given out and not yet back

EXPORT void faults_fail_allocation(long n) {
    atomic_store(&requests, 0);
    atomic_store(&fail_at, n);
}

EXPORT long faults_requests(void) {
    return atomic_load(&requests);
}

EXPORT long faults_live(void) {
    return atomic_load(&live);
}

static int refused(void) {
    return atomic_fetch_add(&requests, 1) + 1 == atomic_load(&fail_at);
}

static void *counted(void *memory) {
    if (memory) atomic_fetch_add(&live, 1);
    return memory;
}

void *__wrap_malloc(size_t size) {
    return refused() ? NULL : counted(__real_malloc(size));
}

void *__wrap_calloc(size_t count, size_t size) {
    return refused() ? NULL : counted(__real_calloc(count, size));
}

void *__wrap_aligned_alloc(size_t alignment, size_t size) {
    return refused() ? NULL : counted(__real_aligned_alloc(alignment, size));
}

int __wrap_posix_memalign(void **memory, size_t alignment, size_t size) {
    int status = refused() ? ENOMEM : __real_posix_memalign(memory, alignment, size);
    if (status == 0) counted(*memory);
    return status;
}

void __wrap_free(void *memory) {
    if (memory) atomic_fetch_sub(&live, 1);
    __real_free(memory);
}

int __wrap_pthread_create(pthread_t *thread, const pthread_attr_t *attributes, void *(*start)(void *),
                          void *argument) {
    return refused() ? 11 : __real_pthread_create(thread, attributes, start, argument);
}
