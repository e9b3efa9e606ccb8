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
    // The same length for every number of rows: a row's result does not depend on the others of its batch.
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
    fetch_results<typename Format::Element, kRows>(tile);
    const long lines = (tile.steps + kLanes - 1) / kLanes, segments = (lines * kLanes - 1) / Format::kSegmentSteps + 1;
    for (long segment = 0, begin = 0, end; segment < segments; ++segment, begin = end) {
        const bool last = segment + 1 == segments;
        end = last ? tile.steps : lines * (segment + 1) / segments * kLanes;
        __m512 sums[kRows][2];
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) sums[row][0] = sums[row][1] = _mm512_setzero_ps();
        for (long line = begin; line < end; line += kLanes) {
            const float* lanes_end = block + (end - line < kLanes ? end - line : kLanes);
            for (const float* lane = block; lane < lanes_end; ++lane) {
                const __m512 left = _mm512_load_ps(panel), right = _mm512_load_ps(panel + 16);
                _mm_prefetch(ahead, _MM_HINT_T1);
                _mm_prefetch(ahead + 64, _MM_HINT_T1);
#pragma GCC unroll 16
                for (int row = 0; row < kRows; ++row) {
                    const __m512 x = _mm512_set1_ps(lane[row * kLanes]);
                    sums[row][0] = Format::multiply_add(sums[row][0], x, left);
                    sums[row][1] = Format::multiply_add(sums[row][1], x, right);
                }
                panel += kColumns;
                ahead += tile.ahead_step;
            }
            block += kRows * kLanes;
        }
        finish_segment<typename Format::Element, kRows>(tile, sums, tile.first && segment == 0, tile.last && last);
    }
}

// A block is a line of 16 lanes of each row, then the next 16 of each.
template <class Format>
void pack(const LinearArgs& args, long first_row, long rows, char* block) {
    using Element = typename Format::Element;
    constexpr long kLineValues = kLanes * Format::kPerLane;
    const Element* x = static_cast<const Element*>(args.x) + first_row * args.x_stride;
    __m512i* to = reinterpret_cast<__m512i*>(block);
    for (long value = 0; value < args.in_features; value += kLineValues) {
        for (long row = 0; row < rows; ++row) {
            _mm512_store_si512(to++, Format::load_lanes(x + row * args.x_stride + value, args.in_features - value));
        }
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
