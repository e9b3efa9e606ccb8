// Attention of a row with one new token. It is bound by reading the cache, so each byte is read once and in the order
// it lies in: all KV heads of 16 keys, then the next 16, first K and then V, part of the context by part.
//
//     scores of a part [heads, keys]    16 keys at a time; the query heads of a KV head share each load
//     weights                           softmax over the part
//     sums of a part [heads, head_dim]  16 keys at a time
//
// Long contexts are cut into parts that run at once, and are merged by their maxima and sums (flash-decoding,
// https://pytorch.org/blog/flash-decoding/). K and V are read in place; only the 16 lanes of a sum are transposed.
#include <algorithm>
#include <cstring>

#include "decode_kernels.h"

namespace tandem {
namespace {

// How far ahead of the arithmetic the cache is prefetched. On two Zen 4 cores, blocks of 12 KiB in random order and
// small pages, reading alone: 17 GB/s without, 24 at 4 KiB, 27 from 8 KiB on.
constexpr long kAheadBytes = 12288;

// The keys that the token sees, numbered without gaps: sink tokens, then the window.
struct Visible {
    long sink, gap, count;

    Visible(const AttentionArgs& args, const AttentionRow& row) {
        const long oldest = row.context - std::min<long>(args.window, row.context);
        sink = std::min<long>(args.sink_tokens, oldest);
        gap = oldest - sink;
        count = row.context - gap;
    }
};

// One thread's buffers for one part.
template <class T>
struct Part {
    long words, words_up, columns;  // of a head; columns in whole pairs of vectors
    uint32_t* q;                    // [heads][words_up]
    float* scores;                  // [heads][kPartKeys], then the weights
    float* sums;                    // [heads][columns]
    float* top;                     // [heads]
    float* total;                   // [heads]
    const uint32_t** keys;          // [kPartKeys]

    explicit Part(const AttentionArgs& args)
        : words(args.head_dim / kPerWord<T>), words_up((words + 15) / 16 * 16), columns(words_up * kPerWord<T>) {
        thread_local AttentionScratch scratch;
        const long heads_up = (args.heads + 15) / 16 * 16;
        const long floats = args.heads * (words_up + kPartKeys + columns) + 2 * heads_up;
        q = scratch.take<uint32_t>(floats + 2 * kPartKeys);
        scores = reinterpret_cast<float*>(q + args.heads * words_up);
        sums = scores + args.heads * kPartKeys;
        top = sums + args.heads * columns;
        total = top + heads_up;
        keys = reinterpret_cast<const uint32_t**>(total + heads_up);
    }
};

template <class T>
void copy_q(const AttentionArgs& args, const AttentionRow& row, Part<T>& part) {
    for (long head = 0; head < args.heads; ++head) {
        const T* const from =
            static_cast<const T*>(args.q) + row.query_start * args.q_token_stride + head * args.q_head_stride;
        uint32_t* const to = part.q + head * part.words_up;
        std::memset(to + part.words_up - 16, 0, 64);
        std::memcpy(to, from, part.words * 4);
    }
}

// The order of reading: K of all batches, then V.
template <class T>
struct Order {
    const Part<T>& part;
    long batches, v_offset, distance;

    // v_offset: from a key's K to its V, in words.
    Order(const Part<T>& part, long padded, long key_words, long v_offset)
        : part(part),
          batches(padded / kBatch),
          v_offset(v_offset),
          distance(std::max(1l, kAheadBytes / (kBatch * key_words * 4))) {}

    // `pass` 0 for K and 1 for V. Past the end, what comes later is what is there now.
    Rows rows(long pass, long batch, long kv_head) const {
        const long now = pass * batches + batch, later = now + distance < 2 * batches ? now + distance : now;
        const auto keys = [&](long step) { return part.keys + step % batches * kBatch; };
        const auto offset = [&](long step) { return kv_head * part.words + (step >= batches ? v_offset : 0); };
        return {keys(now), keys(later), offset(now), offset(later)};
    }
};

template <class T>
void score_keys(const AttentionArgs& args, const Part<T>& part, const Order<T>& order, long padded) {
    const long group = args.heads / args.kv_heads;
    for (long key = 0; key < padded; key += kBatch) {
        for (long kv_head = 0; kv_head < args.kv_heads; ++kv_head) {
            const Rows rows = order.rows(0, key / kBatch, kv_head);
            for (long g = 0; g < group; g += kHeads) {
                const long head = kv_head * group + g;
                const uint32_t* const q = part.q + head * part.words_up;
                float* const scores = part.scores + head * kPartKeys + key;
                const auto run = group - g >= 4   ? score_batch<T, 4>
                                 : group - g == 3 ? score_batch<T, 3>
                                 : group - g == 2 ? score_batch<T, 2>
                                                  : score_batch<T, 1>;
                run(q, part.words, part.words_up, rows, scores);
            }
        }
    }
}

template <class T>
void softmax(const ScoreRule& rule, Part<T>& part, long head, long count, long padded) {
    float* const scores = part.scores + head * kPartKeys;
    __m512 highest = _mm512_set1_ps(kNoMaximum);
    for (long key = 0; key < padded; key += 16) {
        __m512 score = _mm512_load_ps(scores + key);
        if (rule.capped()) score = rule.capped(score);
        score = _mm512_mask_mov_ps(_mm512_set1_ps(kHidden), first_lanes(count - key), score);
        _mm512_store_ps(scores + key, score);
        highest = _mm512_max_ps(highest, score);
    }
    const __m512 factor = _mm512_set1_ps(rule.factor), top = _mm512_set1_ps(max16(highest) * rule.factor);
    __m512 sum = _mm512_setzero_ps();
    for (long key = 0; key < padded; key += 16) {
        const __m512 weight = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + key), factor, top));
        sum = _mm512_add_ps(sum, weight);
        _mm512_store_ps(scores + key, weight);
    }
    part.top[head] = _mm512_cvtss_f32(top);
    part.total[head] = sum16(sum);
}

template <class T, int H>
void add_values(const Part<T>& part, long head, long key, const Rows& rows) {
    for (long column = 0; column < part.columns; column += 64) {
        const long word = column / kPerWord<T>, vectors = std::min(64l, part.columns - column) / 16;
        auto run = vectors == 4 ? value_batch<T, H, 4> : value_batch<T, H, 2>;
        if constexpr (sizeof(T) == 4) {  // bfloat16 has whole pairs of vectors
            if (vectors == 3) run = value_batch<T, H, 3>;
            if (vectors == 1) run = value_batch<T, H, 1>;
        }
        run(part.scores + head * kPartKeys + key, rows, word, part.words, part.sums + head * part.columns + column,
            part.columns);
    }
}

template <class T>
void weigh_values(const AttentionArgs& args, const Part<T>& part, const Order<T>& order, long padded) {
    const long group = args.heads / args.kv_heads;
    std::memset(part.sums, 0, args.heads * part.columns * sizeof(float));
    for (long key = 0; key < padded; key += kBatch) {
        for (long kv_head = 0; kv_head < args.kv_heads; ++kv_head) {
            const Rows rows = order.rows(1, key / kBatch, kv_head);
            for (long g = 0; g < group; g += kHeads) {
                const auto run = group - g >= 4   ? add_values<T, 4>
                                 : group - g == 3 ? add_values<T, 3>
                                 : group - g == 2 ? add_values<T, 2>
                                                  : add_values<T, 1>;
                run(part, kv_head * group + g, key, rows);
            }
        }
    }
}

// From load_values' order to that of memory: evens and odds of 32 columns become neighbours.
template <class T>
inline void order_columns(float* sums, long columns) {
    if constexpr (sizeof(T) == 2) {
        const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
        for (long column = 0; column < columns; column += 32) {
            const __m512 even = _mm512_load_ps(sums + column), odd = _mm512_load_ps(sums + column + 16);
            _mm512_store_ps(sums + column, _mm512_permutex2var_ps(even, low, odd));
            _mm512_store_ps(sums + column + 16, _mm512_permutex2var_ps(even, high, odd));
        }
    }
}

template <class T>
void write_output(const AttentionArgs& args, const float* sums, float factor, long place) {
    T* const to = static_cast<T*>(args.output) + place * args.head_dim;
    for (long column = 0; column < args.head_dim; column += 16) {
        const __m512 values = _mm512_mul_ps(_mm512_loadu_ps(sums + column), _mm512_set1_ps(factor));
        store16(to + column, values, first_lanes(args.head_dim - column));
    }
}

template <class T>
void attend_part(const AttentionArgs& args, const AttentionRow& row, long index, long parts, float* partials) {
    Part<T> part(args);
    copy_q(args, row, part);
    const Visible visible(args, row);
    const long batches = (visible.count + kBatch - 1) / kBatch;  // shared out as evenly as can be
    const long first = batches * index / parts * kBatch;
    const long count = std::min(batches * (index + 1) / parts * kBatch, visible.count) - first;
    const long padded = (count + kBatch - 1) / kBatch * kBatch;
    const long key_words = args.kv_heads * part.words, v_offset = args.block_size * key_words;
    const long sinks = std::max(0l, std::min(visible.sink - first, count));
    find_keys(args, row, first, first + sinks, key_words, 0, part.keys);
    find_keys(args, row, first + sinks + visible.gap, first + count + visible.gap, key_words, 0, part.keys + sinks);
    // Padding reads what is there anyway, and gets a weight of 0.
    std::fill(part.keys + count, part.keys + padded, part.keys[0]);
    const ScoreRule rule(args);
    const Order<T> order(part, padded, key_words, v_offset);
    score_keys(args, part, order, padded);
    for (long head = 0; head < args.heads; ++head) softmax(rule, part, head, count, padded);
    weigh_values(args, part, order, padded);
    for (long head = 0; head < args.heads; ++head) {
        float* const sums = part.sums + head * part.columns;
        order_columns<T>(sums, part.columns);
        if (parts == 1) {
            const long place = row.query_start * args.heads + head;
            const float factor = finish_softmax(args, head, part.top[head], part.total[head], args.lse + place);
            write_output<T>(args, sums, factor, place);
        } else {
            float* const to = partials + index * decode_partial_floats(args) + head * (args.head_dim + 2);
            std::memcpy(to, sums, args.head_dim * sizeof(float));
            to[args.head_dim] = part.top[head];
            to[args.head_dim + 1] = part.total[head];
        }
    }
}

template <class T>
void merge_parts(const AttentionArgs& args, const AttentionRow& row, long parts, const float* partials) {
    alignas(64) float sums[256];
    for (long head = 0; head < args.heads; ++head) {
        const float* const from = partials + head * (args.head_dim + 2);
        const long stride = decode_partial_floats(args);
        float top = kNoMaximum;
        for (long part = 0; part < parts; ++part) top = std::max(top, from[part * stride + args.head_dim]);
        double total = 0;
        std::memset(sums, 0, sizeof sums);
        for (long part = 0; part < parts; ++part) {
            const float* const partial = from + part * stride;
            const float weight = std::exp2(partial[args.head_dim] - top);
            total += weight * partial[args.head_dim + 1];
            for (long column = 0; column < args.head_dim; ++column) sums[column] += weight * partial[column];
        }
        const long place = row.query_start * args.heads + head;
        const float factor = finish_softmax(args, head, top, total, args.lse + place);
        write_output<T>(args, sums, factor, place);
    }
}

}  // namespace

long decode_parts(const AttentionArgs& args, const AttentionRow& row) {
    return (Visible(args, row).count + kPartKeys - 1) / kPartKeys;
}

long decode_partial_floats(const AttentionArgs& args) { return args.heads * (args.head_dim + 2); }

void decode_part(const AttentionArgs& args, const AttentionRow& row, long part, long parts, float* partials) {
    (args.dtype == kFloat32 ? attend_part<float> : attend_part<bf16>)(args, row, part, parts, partials);
}

void decode_merge(const AttentionArgs& args, const AttentionRow& row, long parts, const float* partials) {
    (args.dtype == kFloat32 ? merge_parts<float> : merge_parts<bf16>)(args, row, parts, partials);
}

}  // namespace tandem
