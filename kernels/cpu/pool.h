// The threads that share the work of one call.
//
//     parallel_for(count, body)       body(long index, int thread), indices handed out one by one as threads get free
//     parallel_local(count, body)     the same, but each thread begins with its own share of the indices, the same
//                                     for the same count: what it wrote last time may still be in its cache
//     parallel_ranges(count, body)    body(long begin, long end, int thread), one even, contiguous share per thread
//
// `thread` is in [0, threads()), and no two bodies that run at once have the same. parallel_for hands out index 0
// first. The caller works too, and returns when all is done; a worker that wakes too late is not waited for. A call
// from within a body runs in that body's thread. Calls from several threads take turns.
//
// A worker out of work spins for some microseconds, because the next call of a forward pass comes that soon, then
// sleeps: other processes may want the core.
#pragma once

#include <type_traits>
#include <utility>

namespace tandem {

using PoolBody = void (*)(void* context, long index, int thread);

// The number of threads that a call may use, the caller included.
int threads();

// The type-erased form of parallel_for and, with `local`, of parallel_local.
void pool_run(long count, PoolBody body, void* context, bool local = false);

template <class F>
void parallel_for(long count, F&& body, bool local = false) {
    using Plain = std::remove_reference_t<F>;
    pool_run(
        count, [](void* context, long index, int thread) { (*static_cast<Plain*>(context))(index, thread); },
        const_cast<void*>(static_cast<const void*>(&body)), local);
}

template <class F>
void parallel_local(long count, F&& body) {
    parallel_for(count, body, true);
}

template <class F>
void parallel_ranges(long count, F&& body) {
    const long parts = count < threads() ? count : threads();
    parallel_for(parts, [&](long part, int thread) { body(count * part / parts, count * (part + 1) / parts, thread); });
}

}  // namespace tandem

extern "C" {
// Threads per call from now on, the caller included.
void tandem_set_threads(int count);
int tandem_threads();
// Binds the caller to cpus[0] and pool thread t, now and later, to cpus[t % count]. Returns 0, or an errno.
int tandem_pin(const int* cpus, int count);
}
