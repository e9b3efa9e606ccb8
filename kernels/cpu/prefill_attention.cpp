// Attention of a row with several new tokens, a tile of queries at a time.
//
// FlashAttention-2's order (https://arxiv.org/abs/2307.08691): queries outside, keys inside, online softmax, output
// written once. The query heads that share a KV head are rows of one tile, so keys are packed once for all of them:
//
//     rows of a tile:   token 0 head 0, token 0 head 1, ..., token 1 head 0, ...      (6 at a time in registers)
//     scores            = q [6, head_dim] x packed K [head_dim, 64 keys]
//     output [6, 64]   += weights [6, keys] x packed V [keys, 64]
//
// Both products are one micro-kernel: it broadcasts from the left and keeps 6 x 64 sums in 24 registers. For bfloat16
// a step takes two neighbours of the inner dimension at once (VDPBF16PS), so all operands are in words of 32 bits: a
// float32 or a pair of bfloat16.
//
// Tiles of keys begin at multiples of kKeys in the row's context, whatever the batch or the tile of queries, and hidden
// keys add exact zeros: a token's result depends on its own row alone.
#include <algorithm>

#include "prefill_kernels.h"

namespace tandem {
namespace {

constexpr long kTileRows = 192;  // of a tile of queries, half as many of wide heads: q and output share a megabyte

// A running maximum may lag behind the true one by this many powers of 2 before sums are rescaled. It saves nearly all
// rescaling after the first tile, and float32 does not mind weights up to 64.
constexpr float kLag = 6;

// Terms of a float32 dot product that are added one after the other; such sums are then added. One chain over all of
// head_dim has several times the rounding error, and saves 2 % of the time.
template <class T>
constexpr long kChain = sizeof(T) == 4 ? 32 : 128;

// One thread's buffers for one tile, all in words.
template <class T>
struct Tile {
    long words;       // of a head
    long words_up;    // rounded up to vectors
    long rows;        // tokens * group
    long columns;     // head_dim, rounded up to vectors
    uint32_t* q;      // [rows / 6][words][6]
    uint32_t* k;      // [kKeys / 64][words_up][64]
    uint32_t* v;      // [columns / 64][kKeys / kPerWord][64]
    float* scores;    // [6][kKeys], then the weights, in T
    float* output;    // [rows][columns]
    float* sums;      // [rows][16]
    float* top;       // [rows]: the maximum that weights are relative to

    Tile(const AttentionArgs& args, long row_count)
        : words(args.head_dim / kPerWord<T>),
          words_up((words + 15) / 16 * 16),
          rows((row_count + kRows - 1) / kRows * kRows),
          columns((args.head_dim + 15) / 16 * 16) {
        thread_local AttentionScratch scratch;
        const long panels = (columns + kPanel - 1) / kPanel;
        const long sizes[] = {rows * words_up, kKeys * words_up, panels * kPanel * kKeys / kPerWord<T>,
                              kRows * kKeys, rows * columns, rows * 16, rows};
        long total = 0;
        for (const long size : sizes) total += (size + 15) / 16 * 16;
        uint32_t* next = scratch.take<uint32_t>(total);
        auto give = [&, index = 0]() mutable {
            uint32_t* const given = next;
            next += (sizes[index++] + 15) / 16 * 16;
            return given;
        };
        q = give();
        k = give();
        v = give();
        scores = reinterpret_cast<float*>(give());
        output = reinterpret_cast<float*>(give());
        sums = reinterpret_cast<float*>(give());
        top = reinterpret_cast<float*>(give());
    }
};

template <class T>
void pack_q(const AttentionArgs& args, const AttentionRow& row, long first, long count, long kv_head, Tile<T>& tile) {
    const long group = args.heads / args.kv_heads;
    for (long token = 0; token < count; ++token) {
        for (long g = 0; g < group; ++g) {
            const T* const from_row = static_cast<const T*>(args.q) +
                                      (row.query_start + first + token) * args.q_token_stride +
                                      (kv_head * group + g) * args.q_head_stride;
            const long r = token * group + g;
            uint32_t* const to = tile.q + r / kRows * kRows * tile.words + r % kRows;
            for (long w = 0; w < tile.words; ++w) {
                __builtin_memcpy(to + w * kRows, reinterpret_cast<const char*>(from_row) + w * 4, 4);
            }
        }
    }
}

template <class T>
void pack_k(const uint32_t* const* keys, long key_count, Tile<T>& tile) {
    for (long key = 0; key < key_count; key += 16) {
        uint32_t* const to = tile.k + key / kPanel * kPanel * tile.words_up + key % kPanel;
        for (long word = 0; word < tile.words; word += 16) {
            transpose16(keys + key, word, first_lanes(tile.words - word), to + word * kPanel);
        }
    }
}

// v_offset: from a key's K to its V, in words.
template <class T>
void pack_v(const uint32_t* const* keys, long v_offset, long key_count, Tile<T>& tile) {
    const long panel_words = kKeys / kPerWord<T> * kPanel;
    const auto row_of = [&](long key) { return keys[key] == kZeroRow ? kZeroRow : keys[key] + v_offset; };
    if constexpr (sizeof(T) == 4) {
        for (long key = 0; key < key_count; ++key) {
            const uint32_t* const from = row_of(key);
            for (long word = 0; word < tile.words; word += 16) {
                const __m512i values = _mm512_maskz_loadu_epi32(first_lanes(tile.words - word), from + word);
                _mm512_store_si512(tile.v + word / kPanel * panel_words + key * kPanel + word % kPanel, values);
            }
        }
    } else {
        // Words (even key, odd key) of 32 columns, from one row of each.
        alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                      8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
        const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
        for (long key = 0; key < key_count; key += 2) {
            const uint32_t *const even = row_of(key), *const odd = row_of(key + 1);
            for (long word = 0; word < tile.words; word += 16) {
                const __mmask16 lanes = first_lanes(tile.words - word);
                const __m512i a = _mm512_maskz_loadu_epi32(lanes, even + word);
                const __m512i b = _mm512_maskz_loadu_epi32(lanes, odd + word);
                const long column = 2 * word;
                uint32_t* const to = tile.v + column / kPanel * panel_words + key / 2 * kPanel + column % kPanel;
                _mm512_store_si512(to, _mm512_permutex2var_epi16(a, low, b));
                _mm512_store_si512(to + 16, _mm512_permutex2var_epi16(a, high, b));
            }
        }
    }
}

// Which keys of a tile a token sees: all below `end`, but those in [sink_end, begin).
struct Sight {
    long end, begin, sink_end;
    bool all(long keys) const { return end >= keys && begin <= std::max(0l, sink_end); }
    __mmask16 lanes(long first_key) const {
        const __mmask16 hidden = first_lanes(begin - first_key) & ~first_lanes(sink_end - first_key);
        return first_lanes(end - first_key) & ~hidden;
    }
};

// Turns one row of scores [keys] into weights, in place, and keeps its running maximum, sum and output in step.
template <class T>
void softmax_row(const ScoreRule& rule, const Sight& sight, long keys, float* scores, long columns, float& top,
                 float* sums, float* output) {
    if (rule.capped()) {
        for (long key = 0; key < keys; key += 16) {
            _mm512_store_ps(scores + key, rule.capped(_mm512_load_ps(scores + key)));
        }
    }
    if (!sight.all(keys)) {
        for (long key = 0; key < keys; key += 16) {
            const __m512 score = _mm512_load_ps(scores + key);
            _mm512_store_ps(scores + key, _mm512_mask_mov_ps(_mm512_set1_ps(kHidden), sight.lanes(key), score));
        }
    }
    __m512 highest = _mm512_load_ps(scores), highest2 = _mm512_load_ps(scores + (keys > 16 ? 16 : 0));
    for (long key = 32; key < keys; key += 32) {
        highest = _mm512_max_ps(highest, _mm512_load_ps(scores + key));
        highest2 = _mm512_max_ps(highest2, _mm512_load_ps(scores + (key + 16 < keys ? key + 16 : key)));
    }
    highest = _mm512_max_ps(highest, highest2);
    const __m512 factor = _mm512_set1_ps(rule.factor);
    __m512 past = _mm512_load_ps(sums), sum = _mm512_setzero_ps();
    if (_mm512_cmp_ps_mask(_mm512_mul_ps(highest, factor), _mm512_set1_ps(top + kLag), _CMP_GT_OQ)) {
        const float new_top = max16(highest) * rule.factor;
        const __m512 shrink = _mm512_set1_ps(std::exp2(top - new_top));
        past = _mm512_mul_ps(past, shrink);
        for (long column = 0; column < columns; column += 16) {
            _mm512_store_ps(output + column, _mm512_mul_ps(_mm512_load_ps(output + column), shrink));
        }
        top = new_top;
    }
    const __m512 top16 = _mm512_set1_ps(top);
    if constexpr (sizeof(T) == 4) {
        for (long key = 0; key < keys; key += 16) {
            const __m512 weight = exp2_16(_mm512_fmsub_ps(_mm512_load_ps(scores + key), factor, top16));
            sum = _mm512_add_ps(sum, weight);
            _mm512_store_ps(scores + key, weight);
        }
    } else {
        uint32_t* const weights = reinterpret_cast<uint32_t*>(scores);
        for (long key = 0; key < keys; key += 32) {
            const __m512 first = exp2_16_coarse(_mm512_fmsub_ps(_mm512_load_ps(scores + key), factor, top16));
            const __m512 second = exp2_16_coarse(_mm512_fmsub_ps(_mm512_load_ps(scores + key + 16), factor, top16));
            sum = _mm512_add_ps(sum, _mm512_add_ps(first, second));
            _mm512_store_si512(weights + key / 2, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
        }
    }
    _mm512_store_ps(sums, _mm512_add_ps(past, sum));
}

// Six rows against one tile of keys.
template <class T>
void attend_rows(const Tile<T>& tile, const ScoreRule& rule, const Sight* sights, long first_row, long row_count,
                 long keys) {
    for (long panel = 0; panel < keys; panel += kPanel) {
        const long vectors = std::min(kPanel, keys - panel) / 16;
        const uint32_t* const q = tile.q + first_row * tile.words;
        const uint32_t* const k = tile.k + panel * tile.words_up;
        ScoreTable<T>::get(row_count, vectors)(q, k, tile.scores + panel, kKeys, std::min(kChain<T>, tile.words));
        for (long word = kChain<T>; word < tile.words; word += kChain<T>) {
            AddScoreTable<T>::get(row_count, vectors)(q + word * kRows, k + word * kPanel, tile.scores + panel, kKeys,
                                                      std::min(kChain<T>, tile.words - word));
        }
    }
    for (long r = 0; r < row_count; ++r) {
        softmax_row<T>(rule, sights[r], keys, tile.scores + r * kKeys, tile.columns, tile.top[first_row + r],
                       tile.sums + (first_row + r) * 16, tile.output + (first_row + r) * tile.columns);
    }
    for (long column = 0; column < tile.columns; column += kPanel) {
        const long vectors = std::min(kPanel, tile.columns - column) / 16;
        ValueTable<T>::get(row_count, vectors)(
            reinterpret_cast<const uint32_t*>(tile.scores), tile.v + column * kKeys / kPerWord<T>,
            tile.output + first_row * tile.columns + column, tile.columns, keys / kPerWord<T>);
    }
}

template <class T>
void write_output(const AttentionArgs& args, const AttentionRow& row, long first, long count, long kv_head,
                  const Tile<T>& tile) {
    const long group = args.heads / args.kv_heads;
    for (long r = 0; r < count * group; ++r) {
        const long head = kv_head * group + r % group;
        const long place = (row.query_start + first + r / group) * args.heads + head;
        const float sum = sum16(_mm512_load_ps(tile.sums + r * 16));
        const __m512 factor = _mm512_set1_ps(finish_softmax(args, head, tile.top[r], sum, args.lse + place));
        T* const to = static_cast<T*>(args.output) + place * args.head_dim;
        for (long column = 0; column < args.head_dim; column += 16) {
            const __m512 values = _mm512_load_ps(tile.output + r * tile.columns + column);
            store16(to + column, _mm512_mul_ps(values, factor), first_lanes(args.head_dim - column));
        }
    }
}

template <class T>
void attend_tile(const AttentionArgs& args, const AttentionRow& row, long first, long count, long kv_head) {
    constexpr long kGrain = 16 * kPerWord<T>;
    const long group = args.heads / args.kv_heads, rows = count * group;
    Tile<T> tile(args, rows);
    pack_q(args, row, first, count, kv_head, tile);
    std::fill_n(tile.top, tile.rows, kNoMaximum);
    std::fill_n(tile.sums, tile.rows * 16, 0.0f);
    std::fill_n(tile.output, tile.rows * tile.columns, 0.0f);

    const ScoreRule rule(args);
    const long first_position = row.start() + first, end = first_position + count;
    const long oldest = first_position - std::min(args.window - 1, first_position);
    const long key_words = args.kv_heads * tile.words, v_offset = args.block_size * key_words;
    for (long base = 0; base < end; base += kKeys) {
        if (base >= args.sink_tokens && base + kKeys <= oldest) {
            base = (oldest / kKeys - 1) * kKeys;
            continue;
        }
        const uint32_t* keys[kKeys];
        const long seen = std::min(kKeys, end - base), padded = (seen + kGrain - 1) / kGrain * kGrain;
        find_keys(args, row, base, base + seen, key_words, kv_head * tile.words, keys);
        std::fill(keys + seen, keys + padded, kZeroRow);
        // What no token of the tile sees may be anything, NaN too, and must not be multiplied even by 0.
        const long dead = std::max(base, args.sink_tokens), dead_end = std::min(base + seen, oldest);
        if (dead < dead_end) std::fill(keys + (dead - base), keys + (dead_end - base), kZeroRow);
        pack_k(keys, padded, tile);
        pack_v(keys, v_offset, padded, tile);
        for (long r = 0; r < rows; r += kRows) {
            const long row_count = std::min(kRows, rows - r);
            const long last = first_position + (r + row_count - 1) / group;
            if (last < base) continue;
            Sight sights[kRows];
            for (long i = 0; i < row_count; ++i) {
                const long position = first_position + (r + i) / group;
                sights[i] = {position + 1 - base, position + 1 - std::min(args.window, position + 1) - base,
                             args.sink_tokens - base};
            }
            const long needed = std::min(padded, (last + 1 - base + kGrain - 1) / kGrain * kGrain);
            attend_rows(tile, rule, sights, r, row_count, needed);
        }
    }
    write_output(args, row, first, count, kv_head, tile);
}

}  // namespace

long prefill_tile_tokens(const AttentionArgs& args) {
    const long rows = args.head_dim > 128 ? kTileRows / 2 : kTileRows;
    return std::max(1l, rows / (args.heads / args.kv_heads));
}

void prefill_tile(const AttentionArgs& args, const AttentionRow& row, long first, long count, long kv_head) {
    if (args.dtype == kFloat32) {
        attend_tile<float>(args, row, first, count, kv_head);
    } else {
        attend_tile<bf16>(args, row, first, count, kv_head);
    }
}

}  // namespace tandem
