// The pool behind pool.h: one word says what there is to do, and workers sleep on it (futex).
#include "pool.h"

#include <immintrin.h>
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <climits>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace tandem {
namespace {

// Long enough to bridge the gap between two operations of a layer, short beside a scheduler's time slice.
constexpr long kSpinNanoseconds = 40'000;

// The gate: how many workers are inside the job, whether more may enter, and the job's number.
constexpr uint32_t kInside = (1u << 10) - 1, kOpen = 1u << 10, kNumber = 1u << 11;

// Who sleeps on the gate.
constexpr uint32_t kWorkers = 1, kCaller = 2;

long now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000L + now.tv_nsec;
}

long futex(std::atomic<uint32_t>& word, int operation, uint32_t value, uint32_t who) {
    return syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), operation | FUTEX_PRIVATE_FLAG, value, nullptr,
                   nullptr, who);
}

// Spins until `ready()`, at most kSpinNanoseconds. Says whether it became ready.
template <class F>
bool spin_until(F&& ready) {
    for (long deadline = 0;;) {
        for (int attempt = 0; attempt < 32; ++attempt) {
            if (ready()) return true;
            _mm_pause();
        }
        const long now = now_ns();
        if (deadline == 0) deadline = now + kSpinNanoseconds;
        if (now > deadline) return false;
    }
}

int bind_to(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    if (cpu < 0 || cpu >= CPU_SETSIZE) return EINVAL;
    CPU_SET(cpu, &set);
    return sched_setaffinity(0, sizeof set, &set) == 0 ? 0 : errno;
}

thread_local int inside_as = -1;  // this thread's number while it runs a body

// Who takes which index of a job. Counters carry the job's number, so that none has to be reset.
class Counters {
  public:
    explicit Counters(int shares) : counters_(shares) {}

    // The next index of a share, or -1 when all are taken.
    long take(int share, uint32_t job, long count) {
        std::atomic<uint64_t>& counter = counters_[share].value;
        const long begin = first(share, count), size = first(share + 1, count) - begin;
        uint64_t value = counter.load(std::memory_order_relaxed);
        for (;;) {
            const long taken = value >> 32 == job ? static_cast<uint32_t>(value) : 0;
            if (taken == size) return -1;
            const uint64_t next = (static_cast<uint64_t>(job) << 32) + taken + 1;
            if (counter.compare_exchange_weak(value, next, std::memory_order_relaxed)) return begin + taken;
        }
    }

    long first(int share, long count) const { return count * share / shares(); }
    int shares() const { return static_cast<int>(counters_.size()); }

  private:
    struct alignas(128) Counter {
        std::atomic<uint64_t> value{0};
    };
    std::vector<Counter> counters_;
};

class Pool {
  public:
    int threads() const { return thread_count_.load(std::memory_order_relaxed); }

    void run(long count, PoolBody body, void* context, bool local) {
        if (count <= 0) return;
        if (inside_as >= 0) {
            for (long index = 0; index < count; ++index) body(context, index, inside_as);
            return;
        }
        std::lock_guard<std::mutex> turn(turn_);
        inside_as = 0;
        if (count == 1 || workers_.empty()) {
            for (long index = 0; index < count; ++index) body(context, index, 0);
        } else {
            body_ = body;
            context_ = context;
            count_ = count;
            ++job_;
            counters_ = local ? &local_ : &global_;
            open(count - 1);
            work(0);
            close();
        }
        inside_as = -1;
    }

    void set_threads(int count) {
        if (count < 1) count = 1;
        if (count > static_cast<int>(kInside)) count = kInside;
        std::lock_guard<std::mutex> turn(turn_);
        thread_count_.store(count);
        local_ = Counters(count);
        if (static_cast<int>(workers_.size()) > count - 1) {
            gate_.fetch_add(kNumber);
            futex(gate_, FUTEX_WAKE_BITSET, INT_MAX, kWorkers);
            while (static_cast<int>(workers_.size()) > count - 1) {
                workers_.back().join();
                workers_.pop_back();
            }
        }
        while (static_cast<int>(workers_.size()) < count - 1) {
            const int number = static_cast<int>(workers_.size()) + 1;
            const int cpu = cpus_.empty() ? -1 : cpus_[number % cpus_.size()];
            const uint32_t job = gate_.load() & ~(kOpen | kInside);  // no job is open: this thread holds the turn
            workers_.emplace_back([this, number, cpu, job] { live(number, cpu, job); });
        }
    }

    int pin(const int* cpus, int count) {
        if (count < 1) return EINVAL;
        const int error = bind_to(cpus[0]);
        if (error) return error;
        const int before = threads();
        set_threads(1);
        {
            std::lock_guard<std::mutex> turn(turn_);
            cpus_.assign(cpus, cpus + count);
        }
        set_threads(before);
        return 0;
    }

  private:
    void open(long wanted) {
        const uint32_t gate = gate_.load(std::memory_order_relaxed);
        gate_.store(((gate & ~(kOpen | kInside)) + kNumber) | kOpen, std::memory_order_seq_cst);
        if (sleeping_.load(std::memory_order_seq_cst) > 0) {
            futex(gate_, FUTEX_WAKE_BITSET, static_cast<uint32_t>(wanted < INT_MAX ? wanted : INT_MAX), kWorkers);
        }
    }

    void close() {
        gate_.fetch_and(~kOpen, std::memory_order_seq_cst);
        const auto empty = [this] { return (gate_.load(std::memory_order_acquire) & kInside) == 0; };
        if (spin_until(empty)) return;
        caller_sleeps_.store(true, std::memory_order_seq_cst);
        for (;;) {
            const uint32_t gate = gate_.load(std::memory_order_seq_cst);
            if ((gate & kInside) == 0) break;
            futex(gate_, FUTEX_WAIT_BITSET, gate, kCaller);
        }
        caller_sleeps_.store(false, std::memory_order_relaxed);
    }

    void work(int thread) {
        Counters& counters = *counters_;
        const int shares = counters.shares();
        for (int turn = 0; turn < shares; ++turn) {
            const int share = (thread + turn) % shares;
            for (long index; (index = counters.take(share, job_, count_)) >= 0;) body_(context_, index, thread);
        }
    }

    // `seen` is the last job that this worker knows.
    void live(int number, int cpu, uint32_t seen) {
        if (cpu >= 0) bind_to(cpu);
        inside_as = number;
        while (number < thread_count_.load(std::memory_order_relaxed)) {
            uint32_t gate = gate_.load(std::memory_order_acquire);
            const uint32_t job = gate & ~(kOpen | kInside);
            if (job == seen || !(gate & kOpen)) {
                seen = job;
                wait_for_another(job);
                continue;
            }
            if (!gate_.compare_exchange_weak(gate, gate + 1, std::memory_order_acq_rel)) continue;
            seen = job;
            work(number);
            const uint32_t before = gate_.fetch_sub(1, std::memory_order_seq_cst);
            if ((before & (kOpen | kInside)) == 1 && caller_sleeps_.load(std::memory_order_seq_cst)) {
                futex(gate_, FUTEX_WAKE_BITSET, 1, kCaller);
            }
        }
    }

    void wait_for_another(uint32_t job) {
        const auto another = [this, job] {
            return (gate_.load(std::memory_order_acquire) & ~(kOpen | kInside)) != job;
        };
        if (spin_until(another)) return;
        sleeping_.fetch_add(1, std::memory_order_seq_cst);
        for (;;) {
            const uint32_t gate = gate_.load(std::memory_order_seq_cst);
            if ((gate & ~(kOpen | kInside)) != job) break;
            futex(gate_, FUTEX_WAIT_BITSET, gate, kWorkers);
        }
        sleeping_.fetch_sub(1, std::memory_order_seq_cst);
    }

    // What workers poll, what they count down and what they only read lie on cache lines of their own.
    alignas(128) std::atomic<uint32_t> gate_{0};
    std::atomic<bool> caller_sleeps_{false};
    std::atomic<int> sleeping_{0};
    alignas(128) PoolBody body_ = nullptr;
    void* context_ = nullptr;
    long count_ = 0;
    uint32_t job_ = 0;
    Counters* counters_ = nullptr;
    std::atomic<int> thread_count_{1};
    alignas(128) std::mutex turn_;
    Counters global_{1}, local_{1};
    std::vector<std::thread> workers_;
    std::vector<int> cpus_;
};

// Never destroyed: workers may still sleep on it while the process ends.
Pool& pool() {
    static Pool* const instance = new Pool;
    return *instance;
}

}  // namespace

int threads() { return pool().threads(); }

void pool_run(long count, PoolBody body, void* context, bool local) { pool().run(count, body, context, local); }

}  // namespace tandem

extern "C" {
void tandem_set_threads(int count) { tandem::pool().set_threads(count); }
int tandem_threads() { return tandem::threads(); }
int tandem_pin(const int* cpus, int count) { return tandem::pool().pin(cpus, count); }
}
