// The inner loops of prefill_attention.cpp: products of a few rows with a packed panel, and the packing.
#pragma once

#include "attention.h"

namespace tandem {
namespace {

constexpr long kRows = 6;     // rows of a micro-kernel: 6 x 4 sums, 4 vectors of the right side, 1 broadcast
constexpr long kPanel = 64;   // columns of one panel of the right side
constexpr long kKeys = 128;   // keys of a tile

template <class T>
inline __m512 step(__m512 sum, __m512i left, __m512i right) {
    if constexpr (sizeof(T) == 4) {
        return _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum);
    } else {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(left), reinterpret_cast<__m512bh>(right));
    }
}

// to [M, N * 16] (+)= left [M, steps] x right [steps, N * 16], in words. `right` is one panel. What is added to is read
// last, so that the sum over steps is a short one.
template <class T, int M, int N, long kLeftRow, long kLeftStep, bool kAdd>
void multiply(const uint32_t* left, const uint32_t* right, float* to, long to_row, long steps) {
    __m512 sum[M][N];
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) sum[m][n] = _mm512_setzero_ps();
    for (long k = 0; k < steps; ++k) {
        __m512i columns[N];
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) columns[n] = _mm512_load_si512(right + k * kPanel + n * 16);
#pragma GCC unroll 6
        for (int m = 0; m < M; ++m) {
            const __m512i value = _mm512_set1_epi32(static_cast<int>(left[m * kLeftRow + k * kLeftStep]));
#pragma GCC unroll 4
            for (int n = 0; n < N; ++n) sum[m][n] = step<T>(sum[m][n], value, columns[n]);
        }
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) {
            float* const place = to + m * to_row + n * 16;
            _mm512_store_ps(place, kAdd ? _mm512_add_ps(_mm512_load_ps(place), sum[m][n]) : sum[m][n]);
        }
}

using Multiply = void (*)(const uint32_t*, const uint32_t*, float*, long, long);

// By rows - 1 and vectors - 1.
template <class T, long kLeftRow, long kLeftStep, bool kAdd>
struct MultiplyTable {
    template <int M>
    static constexpr Multiply of(long vectors) {
        return vectors == 4   ? multiply<T, M, 4, kLeftRow, kLeftStep, kAdd>
               : vectors == 3 ? multiply<T, M, 3, kLeftRow, kLeftStep, kAdd>
               : vectors == 2 ? multiply<T, M, 2, kLeftRow, kLeftStep, kAdd>
                              : multiply<T, M, 1, kLeftRow, kLeftStep, kAdd>;
    }
    static constexpr Multiply get(long rows, long vectors) {
        return rows == 6   ? of<6>(vectors)
               : rows == 5 ? of<5>(vectors)
               : rows == 4 ? of<4>(vectors)
               : rows == 3 ? of<3>(vectors)
               : rows == 2 ? of<2>(vectors)
                           : of<1>(vectors);
    }
};

template <class T>
using ScoreTable = MultiplyTable<T, 1, kRows, false>;
template <class T>
using AddScoreTable = MultiplyTable<T, 1, kRows, true>;
template <class T>
using ValueTable = MultiplyTable<T, kKeys, 1, true>;

// 16 x 16 words: to[w * kPanel + r] = rows[r][w].
inline void transpose16(const uint32_t* const* rows, long word, __mmask16 lanes, uint32_t* to) {
    __m512i a[16], b[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; ++r) a[r] = _mm512_maskz_loadu_epi32(lanes, rows[r] + word);
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        b[r] = _mm512_unpacklo_epi32(a[r], a[r + 1]);
        b[r + 1] = _mm512_unpackhi_epi32(a[r], a[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) {
        a[r] = _mm512_unpacklo_epi64(b[r], b[r + 2]);
        a[r + 1] = _mm512_unpackhi_epi64(b[r], b[r + 2]);
        a[r + 2] = _mm512_unpacklo_epi64(b[r + 1], b[r + 3]);
        a[r + 3] = _mm512_unpackhi_epi64(b[r + 1], b[r + 3]);
    }
    // a[4 i + j] has, in 128-bit lane l, word 4 l + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
        const __m512i low01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44);
        const __m512i high01 = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xee);
        const __m512i low23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
        const __m512i high23 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xee);
        _mm512_store_si512(to + j * kPanel, _mm512_shuffle_i32x4(low01, low23, 0x88));
        _mm512_store_si512(to + (4 + j) * kPanel, _mm512_shuffle_i32x4(low01, low23, 0xdd));
        _mm512_store_si512(to + (8 + j) * kPanel, _mm512_shuffle_i32x4(high01, high23, 0x88));
        _mm512_store_si512(to + (12 + j) * kPanel, _mm512_shuffle_i32x4(high01, high23, 0xdd));
    }
}

alignas(64) const uint32_t kZeroRow[256] = {};

}  // namespace
}  // namespace tandem
