// The inner loops of decode_attention.cpp: 16 keys against a few query heads, read where they lie in the cache.
#pragma once

#include "attention.h"

namespace tandem {
namespace {

constexpr long kBatch = 16;      // keys at a time
constexpr long kHeads = 4;       // query heads at a time: 4 heads x 4 keys of sums, or 4 heads x 4 vectors

// Keys of a part, at most. With 64 the memory is idle too often at the start of parts (20 % slower on two Zen 4 cores),
// with 512 one row of 300 to 512 keys has only one thread; between them it does not matter.
constexpr long kPartKeys = 256;

// Sums of the lanes of 4 x 4 vectors, [key][4 partial sums] to [key].
inline __m512 add_lanes4(const __m512* x) {
    const __m512 t0 = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    const __m512 t1 = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    const __m512d d0 = _mm512_castps_pd(t0), d1 = _mm512_castps_pd(t1);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(d0, d1)), _mm512_castpd_ps(_mm512_unpackhi_pd(d0, d1)));
}

// From 4 results of add_lanes4 (each has one key per lane of its 128-bit quarters) to 16 sums in the order of keys.
inline __m512 add_quarters(const __m512* x) {
    const __m512 a = _mm512_add_ps(_mm512_shuffle_f32x4(x[0], x[1], 0x44), _mm512_shuffle_f32x4(x[0], x[1], 0xee));
    const __m512 b = _mm512_add_ps(_mm512_shuffle_f32x4(x[2], x[3], 0x44), _mm512_shuffle_f32x4(x[2], x[3], 0xee));
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

// 16 rows of K or V of one KV head, and those that will be read some batches later.
struct Rows {
    const uint32_t* const* keys;
    const uint32_t* const* later_keys;
    long offset, later_offset;

    const uint32_t* at(long key) const { return keys[key] + offset; }
    // To the second level: fetching as much to the first would stall on its few miss buffers.
    void prefetch(long key, long word) const {
        _mm_prefetch(reinterpret_cast<const char*>(later_keys[key] + later_offset + word), _MM_HINT_T1);
    }
};

inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b, float) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
}
inline __m512 multiply_add(__m512 sum, __m512i a, __m512i b, bf16) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

// Scores of H heads and 16 keys: q [H, words_up] (zero past the head) against the rows.
template <class T, int H>
void score_batch(const uint32_t* q, long words, long words_up, const Rows& rows, float* scores) {
    __m512 quarters[H][4];
    for (int four = 0; four < 4; ++four) {
        __m512 sum[H][4];
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) sum[h][i] = _mm512_setzero_ps();
        for (long word = 0; word < words; word += 16) {
            const __mmask16 lanes = first_lanes(words - word);
            __m512i k[4];
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) k[i] = _mm512_maskz_loadu_epi32(lanes, rows.at(4 * four + i) + word);
#pragma GCC unroll 4
            for (int i = 0; i < 4; ++i) rows.prefetch(4 * four + i, word);
#pragma GCC unroll 4
            for (int h = 0; h < H; ++h) {
                const __m512i query = _mm512_load_si512(q + h * words_up + word);
#pragma GCC unroll 4
                for (int i = 0; i < 4; ++i) sum[h][i] = multiply_add(sum[h][i], query, k[i], T{});
            }
        }
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) quarters[h][four] = add_lanes4(sum[h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) _mm512_store_ps(scores + h * kPartKeys, add_quarters(quarters[h]));
}

// V as float32: 16 columns of a float32 row, or 32 of a bfloat16 row as evens and odds.
template <class T, int N>
inline void load_values(const uint32_t* from, long words, __m512* to) {
    if constexpr (sizeof(T) == 4) {
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            to[n] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi32(first_lanes(words - 16 * n), from + 16 * n));
        }
    } else {
#pragma GCC unroll 2
        for (int n = 0; n < N; n += 2) {
            const __m512i pairs = _mm512_maskz_loadu_epi32(first_lanes(words - 8 * n), from + 8 * n);
            to[n] = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
            to[n + 1] = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
        }
    }
}

// sums [H, columns] += weights [H, 16] x V [16, N * 16 columns]; for bfloat16, columns are in load_values' order.
template <class T, int H, int N>
void value_batch(const float* weights, const Rows& rows, long word, long words, float* sums, long columns) {
    __m512 sum[H][N];
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[h][n] = _mm512_load_ps(sums + h * columns + n * 16);
    for (long key = 0; key < kBatch; ++key) {
        __m512 values[N];
        load_values<T, N>(rows.at(key) + word, words - word, values);
#pragma GCC unroll 4
        for (int n = 0; n < N / kPerWord<T>; ++n) rows.prefetch(key, word + 16 * n);
#pragma GCC unroll 4
        for (int h = 0; h < H; ++h) {
            const __m512 weight = _mm512_set1_ps(weights[h * kPartKeys + key]);
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[h][n] = _mm512_fmadd_ps(weight, values[n], sum[h][n]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) _mm512_store_ps(sums + h * columns + n * 16, sum[h][n]);
}

}  // namespace
}  // namespace tandem
