// float32 and bfloat16 weights: one lane is one float32, or two bfloat16 that VDPBF16PS multiplies and adds.
#include <utility>

#include "linear.h"

namespace tandem {
namespace {

// Fewer would do to hide the latency of multiply-add; more rows per panel load leave the load ports idle half the time.
constexpr int kMaxRows = 14;

struct Float32 {
    using Element = float;
    static constexpr int kPerLane = 1;
    // A sum of n terms one after the other errs by about n roundings of one term, one of n / s segments by sqrt(n * s).
    static constexpr long kSegmentSteps = 192;
    static __m512 multiply_add(__m512 sum, __m512 x, __m512 w) { return _mm512_fmadd_ps(x, w, sum); }
    // The lanes of 16 steps of one row; those past `count` values are zero.
    static __m512i load_lanes(const float* row, long count) {
        return _mm512_castps_si512(_mm512_maskz_loadu_ps(first_lanes(count), row));
    }
};

struct Bfloat16 {
    using Element = bf16;
    static constexpr int kPerLane = 2;
    static constexpr long kSegmentSteps = 768;  // the result's own rounding is far coarser
    static __m512 multiply_add(__m512 sum, __m512 x, __m512 w) {
        return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(w));
    }
    static __m512i load_lanes(const bf16* row, long count) {
        const __mmask32 values = count >= 32 ? ~0u : (1u << count) - 1;
        return _mm512_maskz_loadu_epi16(values, row);
    }
};

template <class Format, int kRows>
void multiply_tile(const Tile& tile) {
    const float* block = reinterpret_cast<const float*>(tile.block);
    const float* panel = reinterpret_cast<const float*>(tile.panel);
    const char* ahead = tile.ahead;
    for (long begin = 0; begin < tile.steps; begin += Format::kSegmentSteps) {
        const long left_over = tile.steps - begin;
        const bool last = left_over <= Format::kSegmentSteps;
        __m512 sums[kRows][2];
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
        for (long step = last ? left_over : Format::kSegmentSteps; step > 0; --step) {
            const __m512 left = _mm512_load_ps(panel), right = _mm512_load_ps(panel + 16);
            _mm_prefetch(ahead, _MM_HINT_T1);
            _mm_prefetch(ahead + 64, _MM_HINT_T1);
#pragma GCC unroll 16
            for (int row = 0; row < kRows; ++row) {
                const __m512 x = _mm512_set1_ps(block[row]);
                sums[row][0] = Format::multiply_add(sums[row][0], x, left);
                sums[row][1] = Format::multiply_add(sums[row][1], x, right);
            }
            block += kRows;
            panel += kColumns;
            ahead += tile.ahead_step;
        }
        finish_segment<typename Format::Element, kRows>(tile, sums, tile.first && begin == 0, tile.last && last);
    }
}

// 16 rows of 16 lanes become 16 columns.
void transpose(__m512i (&rows)[16]) {
    __m512i half[16];
    for (int i = 0; i < 16; i += 2) {
        half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        for (int j = 0; j < 2; ++j) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(half[i + j], half[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(half[i + j], half[i + 2 + j]);
        }
    }
    // rows[4 * i + j], 128-bit lane l: column 4 * l + j of the rows 4 * i to 4 * i + 3.
    for (int j = 0; j < 4; ++j) {
        const __m512i a = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0x44);
        const __m512i b = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0x44);
        const __m512i c = _mm512_shuffle_i32x4(rows[j], rows[4 + j], 0xee);
        const __m512i d = _mm512_shuffle_i32x4(rows[8 + j], rows[12 + j], 0xee);
        half[j] = _mm512_shuffle_i32x4(a, b, 0x88);
        half[4 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        half[8 + j] = _mm512_shuffle_i32x4(c, d, 0x88);
        half[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; ++i) rows[i] = half[i];
}

// Stores run over a step's end into the next one's place, and at last into the 64 bytes that follow every block.
template <class Format>
void pack(const LinearArgs& args, long first_row, long rows, char* block) {
    using Element = typename Format::Element;
    const Element* x = static_cast<const Element*>(args.x) + first_row * args.x_stride;
    const long steps = (args.in_features + Format::kPerLane - 1) / Format::kPerLane;
    int32_t* to = reinterpret_cast<int32_t*>(block);
    for (long step = 0; step < steps; step += 16) {
        const long value = step * Format::kPerLane, left = args.in_features - value;
        __m512i lanes[16];
        for (long row = 0; row < 16; ++row) {
            lanes[row] = row < rows ? Format::load_lanes(x + row * args.x_stride + value, left) : _mm512_setzero_si512();
        }
        transpose(lanes);
        const long columns = steps - step < 16 ? steps - step : 16;
        for (long column = 0; column < columns; ++column) _mm512_storeu_si512(to + column * rows, lanes[column]);
        to += 16 * rows;
    }
}

template <class Format, int... kRows>
const LinearKernel& kernel_of(std::integer_sequence<int, kRows...>) {
    static constexpr LinearKernel::TileFunction tiles[] = {nullptr, multiply_tile<Format, kRows + 1>...};
    static constexpr LinearKernel kernel = {kMaxRows, Format::kPerLane, kColumns * 4, 4, pack<Format>, tiles};
    return kernel;
}

}  // namespace

const LinearKernel& dense_kernel(const LinearArgs& args) {
    constexpr std::make_integer_sequence<int, kMaxRows> rows;
    return args.format == kWeightFloat32 ? kernel_of<Float32>(rows) : kernel_of<Bfloat16>(rows);
}

}  // namespace tandem
