// AVX-512 helpers that kernels share: 16 floats from and to memory of either type, exp, sums.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace tandem {

// A bfloat16 as it lies in memory: the upper half of a float32.
struct bf16 {
    uint16_t bits;
};

// The type of a tensor, as the structs of arguments say it.
enum ElementType : int { kFloat32 = 0, kBfloat16 = 1 };

inline __mmask16 first_lanes(long count) {
    return count >= 16 ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

inline __m512 widen(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }

// To nearest, ties to even. A subnormal becomes zero.
inline __m256i narrow(__m512 value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)); }

inline __m512 load16(const float* from) { return _mm512_loadu_ps(from); }
inline __m512 load16(const bf16* from) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))); }

// Lanes outside the mask are zero, and their memory is not touched.
inline __m512 load16(const float* from, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, from); }
inline __m512 load16(const bf16* from, __mmask16 lanes) { return widen(_mm256_maskz_loadu_epi16(lanes, from)); }

inline void store16(float* to, __m512 value) { _mm512_storeu_ps(to, value); }
inline void store16(bf16* to, __m512 value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), narrow(value)); }

inline void store16(float* to, __m512 value, __mmask16 lanes) { _mm512_mask_storeu_ps(to, lanes, value); }
inline void store16(bf16* to, __m512 value, __mmask16 lanes) { _mm256_mask_storeu_epi16(to, lanes, narrow(value)); }

inline float to_float(float value) { return value; }
inline float to_float(bf16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    __builtin_memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// exp to about one unit in the last place: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]. -inf gives 0, NaN gives
// NaN, and what float32 cannot hold gives 0 or inf.
inline __m512 exp16(__m512 x) {
    const __m512 lowest = _mm512_set1_ps(-110.0f), highest = _mm512_set1_ps(100.0f);
    x = _mm512_min_ps(highest, _mm512_max_ps(lowest, x));  // in this order of operands a NaN stays one
    const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);  // ln 2 in two parts, the first exact times n
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.0f / 5040.0f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 720.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 120.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 24.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f / 6.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.5f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

inline float sum16(__m512 value) { return _mm512_reduce_add_ps(value); }
inline float max16(__m512 value) { return _mm512_reduce_max_ps(value); }

}  // namespace tandem
