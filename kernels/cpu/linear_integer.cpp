// int8 and int4 weights with one scale per group of 32 along K; x is rounded on the fly to int8 with one scale per row
// and group. VPDPBUSD multiplies unsigned by signed bytes: weights are the unsigned ones.
//
//     w = scale * (u - 128)          int8, symmetric; the 128 is taken off in integers: sums start at -128 * sum(x)
//     w = scale * u + minimum        int4, as in GGUF's Q4_1; the minimum is multiplied with the group's sum of x
//
// A step is a group. In a panel it is 8 quads of kColumns lanes (int4: 4, the upper halves of the bytes hold the next
// quad), then kColumns scales, then for int4 as many minima; in a block 8 quads of each row, then scales, then sums.
#include <utility>

#include "linear.h"

namespace tandem {
namespace {

constexpr int kMaxRows = 7;  // integer and float sums: 28 registers
constexpr int kQuads = kGroup / 4;

// Tiles of few rows read so fast that the processor fetches ahead by itself, and asking it to costs more than it brings
// (5.1 against 6.3 ms for all int8 products of SmolLM2-135M with 8 rows).
constexpr int kMaxRowsUnaided = 4;

struct Int8 {
    static constexpr bool kHasMinimum = false;
    static constexpr int kQuadBytes = kQuads * kColumns * 4;
    // The lanes of one quad and half of the panel.
    static __m512i load(const char* panel, int quad, int half) {
        return _mm512_load_si512(panel + (quad * kColumns + half * 16) * 4);
    }
};

struct Int4 {
    static constexpr bool kHasMinimum = true;
    static constexpr int kQuadBytes = kQuads * kColumns * 2;
    static __m512i load(const char* panel, int quad, int half) {
        const __m512i bytes = _mm512_load_si512(panel + (quad / 2 * kColumns + half * 16) * 4);
        const __m512i lower = _mm512_set1_epi8(0x0f);
        return _mm512_and_si512(quad % 2 ? _mm512_srli_epi16(bytes, 4) : bytes, lower);
    }
};

template <bool kWide>
inline __m512 load_scales(const char* from) {
    if constexpr (kWide) return _mm512_load_ps(from);
    return _mm512_cvtph_ps(_mm256_load_si256(reinterpret_cast<const __m256i*>(from)));
}

template <class Format, bool kWide, int kRows>
void multiply_tile(const Tile& tile) {
    constexpr int kScaleBytes = kWide ? 4 : 2;
    constexpr int kStepBytes = Format::kQuadBytes + kColumns * kScaleBytes * (Format::kHasMinimum ? 2 : 1);
    const int32_t* block = reinterpret_cast<const int32_t*>(tile.block);
    const char* panel = tile.panel;
    const char* ahead = tile.ahead;
    __m512 sums[kRows][2];
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
    for (long step = 0; step < tile.steps; ++step) {
        if (kRows > kMaxRowsUnaided) {
            for (long byte = 0; byte < tile.ahead_step; byte += 64) _mm_prefetch(ahead + byte, _MM_HINT_T1);
        }
        const int32_t* row_scales = block + kQuads * kRows;
        const int32_t* row_sums = row_scales + kRows;
        __m512i dots[kRows][2];
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            dots[row][0] = Format::kHasMinimum ? _mm512_setzero_si512() : _mm512_set1_epi32(row_sums[row]);
            dots[row][1] = dots[row][0];
        }
#pragma GCC unroll 8
        for (int quad = 0; quad < kQuads; ++quad) {
            const __m512i left = Format::load(panel, quad, 0), right = Format::load(panel, quad, 1);
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
                const __m512i x = _mm512_set1_epi32(block[row * kQuads + quad]);
                dots[row][0] = _mm512_dpbusd_epi32(dots[row][0], left, x);
                dots[row][1] = _mm512_dpbusd_epi32(dots[row][1], right, x);
            }
        }
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half) {
            const char* scales = panel + Format::kQuadBytes + half * 16 * kScaleBytes;
            const __m512 scale = load_scales<kWide>(scales);
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
                const __m512 row_scale = _mm512_castsi512_ps(_mm512_set1_epi32(row_scales[row]));
                const __m512 dot = _mm512_cvtepi32_ps(dots[row][half]);
                sums[row][half] = _mm512_fmadd_ps(dot, _mm512_mul_ps(scale, row_scale), sums[row][half]);
            }
            if constexpr (Format::kHasMinimum) {
                const __m512 minimum = load_scales<kWide>(scales + kColumns * kScaleBytes);
#pragma GCC unroll 16
                for (int row = 0; row < kRows; ++row) {
                    const __m512 row_sum = _mm512_castsi512_ps(_mm512_set1_epi32(row_sums[row]));
                    sums[row][half] = _mm512_fmadd_ps(minimum, row_sum, sums[row][half]);
                }
            }
        }
        block += (kQuads + 2) * kRows;
        panel += kStepBytes;
        ahead += tile.ahead_step;
    }
    if (tile.element == kFloat32) {
        finish_segment<float, kRows>(tile, sums, tile.first, tile.last);
    } else {
        finish_segment<bf16, kRows>(tile, sums, tile.first, tile.last);
    }
}

struct Quantised {
    __m128i low, high;  // 32 int8
    float scale;
    int32_t sum;
};

// To the nearest multiple of the largest / 127. With an infinity or NaN among them the scale is NaN.
inline Quantised quantise(__m512 low, __m512 high) {
    const __m512i magnitude = _mm512_max_epi32(_mm512_castps_si512(_mm512_abs_ps(low)),
                                               _mm512_castps_si512(_mm512_abs_ps(high)));
    const int32_t bits = _mm512_reduce_max_epi32(magnitude);  // as integers: NaN is above infinity, that above the rest
    float largest;
    __builtin_memcpy(&largest, &bits, sizeof largest);
    const float inverse = largest > 1e-36f ? 127.0f / largest : 0.0f;
    Quantised result;
    result.scale = bits >= 0x7f800000 ? __builtin_nanf("") : inverse > 0 ? largest / 127.0f : 0.0f;
    const __m512i q_low = _mm512_cvtps_epi32(_mm512_mul_ps(low, _mm512_set1_ps(inverse)));
    const __m512i q_high = _mm512_cvtps_epi32(_mm512_mul_ps(high, _mm512_set1_ps(inverse)));
    result.sum = _mm512_reduce_add_epi32(_mm512_add_epi32(q_low, q_high));
    result.low = _mm512_cvtsepi32_epi8(q_low);
    result.high = _mm512_cvtsepi32_epi8(q_high);
    return result;
}

template <bool kHasMinimum, class Element>
void pack(const LinearArgs& args, long first_row, long rows, char* block) {
    const long groups = (args.in_features + kGroup - 1) / kGroup;
    for (long row = 0; row < rows; ++row) {
        const Element* x = static_cast<const Element*>(args.x) + (first_row + row) * args.x_stride;
        int32_t* to = reinterpret_cast<int32_t*>(block);
        for (long group = 0; group < groups; ++group) {
            const long value = group * kGroup, left = args.in_features - value;
            const __m512 low = load16(x + value, first_lanes(left));
            const __m512 high = load16(x + value + 16, first_lanes(left - 16));
            const Quantised q = quantise(low, high);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + row * kQuads), q.low);
            _mm_storeu_si128(reinterpret_cast<__m128i*>(to + row * kQuads + 4), q.high);
            int32_t* const scale = to + kQuads * rows + row;
            __builtin_memcpy(scale, &q.scale, 4);
            const float scaled = q.scale * static_cast<float>(q.sum);
            const int32_t correction = -128 * q.sum;
            if (kHasMinimum) {
                __builtin_memcpy(scale + rows, &scaled, 4);
            } else {
                __builtin_memcpy(scale + rows, &correction, 4);
            }
            to += (kQuads + 2) * rows;
        }
    }
}

template <class Format, bool kWide, int... kRows>
const LinearKernel& kernel_of(int element, std::integer_sequence<int, kRows...>) {
    constexpr int kStepBytes = Format::kQuadBytes + kColumns * (kWide ? 4 : 2) * (Format::kHasMinimum ? 2 : 1);
    static constexpr LinearKernel::TileFunction tiles[] = {nullptr, multiply_tile<Format, kWide, kRows + 1>...};
    static constexpr LinearKernel kernels[] = {
        {kMaxRows, kGroup, kStepBytes, (kQuads + 2) * 4, pack<Format::kHasMinimum, float>, tiles},
        {kMaxRows, kGroup, kStepBytes, (kQuads + 2) * 4, pack<Format::kHasMinimum, bf16>, tiles}};
    return kernels[element];
}

}  // namespace

const LinearKernel& integer_kernel(const LinearArgs& args) {
    constexpr std::make_integer_sequence<int, kMaxRows> rows;
    if (args.format == kWeightInt8) {
        return args.wide_scales ? kernel_of<Int8, true>(args.element, rows)
                                : kernel_of<Int8, false>(args.element, rows);
    }
    return args.wide_scales ? kernel_of<Int4, true>(args.element, rows)
                            : kernel_of<Int4, false>(args.element, rows);
}

}  // namespace tandem
