// Runs a recorded sequence of calls, one after another, without Python in between; and picks rows, which a forward pass
// begins and ends with.
#include <cstdint>
#include <cstring>

#include "pool.h"

namespace {

// Below this a copy is over before another thread has woken up.
constexpr int64_t kBytesAlone = 64 << 10;

struct Call {
    void (*function)(const void* args);
    const void* args;
};

struct ReplayArgs {
    const Call* calls;
    int64_t count;
};

struct TakeRowsArgs {
    const char* table;    // [n, row_bytes], rows `stride` bytes apart
    const int64_t* rows;  // [count], each in [0, n)
    char* output;         // [count, row_bytes]
    int64_t count;
    int64_t row_bytes;
    int64_t stride;
};

}  // namespace

extern "C" {

void tandem_replay(const ReplayArgs* args) {
    for (int64_t index = 0; index < args->count; ++index) {
        args->calls[index].function(args->calls[index].args);
    }
}

void tandem_take_rows(const TakeRowsArgs* args) {
    const auto take = [&](long begin, long end) {
        for (long row = begin; row < end; ++row) {
            std::memcpy(args->output + row * args->row_bytes, args->table + args->rows[row] * args->stride,
                        args->row_bytes);
        }
    };
    if (args->count * args->row_bytes <= kBytesAlone) {
        take(0, args->count);
    } else {
        tandem::parallel_ranges(args->count, [&](long begin, long end, int) { take(begin, end); });
    }
}

}
