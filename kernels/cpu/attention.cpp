// Paged attention of a ragged batch: one list of pieces of work, the longest first, shared by all threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "attention.h"
#include "pool.h"

namespace tandem {
namespace {

// A query tile of a row (kv_head >= 0), or one part of a decode row's context.
struct Piece {
    long row;
    long first;    // token of the row, or part
    long kv_head;  // -1: decode
    long keys;     // how long it will take, among pieces of its kind
};

// A decode row in several parts: whoever finishes last merges them.
struct Split {
    long parts, first_float;
    std::atomic<long> left;
    Split(long count, long first) : parts(count), first_float(first), left(count) {}
    Split(const Split& other) : parts(other.parts), first_float(other.first_float), left(other.parts) {}
};

struct Work {
    std::vector<Piece> pieces;
    std::vector<Split> splits;
    std::vector<long> split_of_row;
    std::vector<float> partials;
};

void add_padding(const AttentionArgs& args, const AttentionRow& row) {
    const long floats = row.query_count * args.heads, bytes = args.dtype == kFloat32 ? 4 : 2;
    std::memset(static_cast<char*>(args.output) + row.query_start * args.heads * args.head_dim * bytes, 0,
                floats * args.head_dim * bytes);
    std::fill_n(args.lse + row.query_start * args.heads, floats, -INFINITY);
}

void plan(const AttentionArgs& args, Work& work) {
    work.pieces.clear();
    work.splits.clear();
    work.split_of_row.assign(args.rows, -1);
    const long tile = prefill_tile_tokens(args);
    long floats = 0;
    for (long r = 0; r < args.rows; ++r) {
        const AttentionRow row(args, r);
        if (row.context == 0) {
            add_padding(args, row);
        } else if (row.query_count == 1) {
            const long parts = decode_parts(args, row);
            if (parts > 1) {
                work.split_of_row[r] = static_cast<long>(work.splits.size());
                work.splits.emplace_back(parts, floats);
                floats += parts * decode_partial_floats(args);
            }
            for (long part = 0; part < parts; ++part) work.pieces.push_back({r, part, -1, 0});
        } else {
            for (long first = 0; first < row.query_count; first += tile) {
                const long end = row.start() + std::min(first + tile, row.query_count);
                for (long head = 0; head < args.kv_heads; ++head) work.pieces.push_back({r, first, head, end});
            }
        }
    }
    if (static_cast<long>(work.partials.size()) < floats) work.partials.resize(floats);
    std::stable_sort(work.pieces.begin(), work.pieces.end(),
                     [](const Piece& a, const Piece& b) { return a.keys > b.keys; });
}

void run(const AttentionArgs& args, Work& work, const Piece& piece) {
    const AttentionRow row(args, piece.row);
    if (piece.kv_head >= 0) {
        const long count = std::min(prefill_tile_tokens(args), row.query_count - piece.first);
        prefill_tile(args, row, piece.first, count, piece.kv_head);
        return;
    }
    const long index = work.split_of_row[piece.row];
    if (index < 0) {
        decode_part(args, row, 0, 1, nullptr);
        return;
    }
    Split& split = work.splits[index];
    float* const partials = work.partials.data() + split.first_float;
    decode_part(args, row, piece.first, split.parts, partials);
    if (split.left.fetch_sub(1, std::memory_order_acq_rel) == 1) decode_merge(args, row, split.parts, partials);
}

}  // namespace
}  // namespace tandem

extern "C" void tandem_paged_attention(const tandem::AttentionArgs* args) {
    thread_local tandem::Work work;
    tandem::Work& mine = work;
    tandem::plan(*args, mine);
    tandem::parallel_for(static_cast<long>(mine.pieces.size()),
                         [&](long index, int) { tandem::run(*args, mine, mine.pieces[index]); });
}
