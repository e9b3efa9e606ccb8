// y = x W^T + bias: what the formats share.
//
// Weights lie in panels of kColumns output features, zeros after the last. Along K a panel is a run of steps, and a
// step holds kColumns lanes of 32 bits: one float32 or two bfloat16; in the integer formats a step is a whole group. A
// call first packs x, in blocks of a few rows: a line of kLanes lanes of each row, then the next of each, so that no
// power of two between rows makes them fight for cache sets. A tile is one block times one panel: per step it loads the
// panel's lanes, broadcasts each row's, and adds to rows x kColumns sums in registers. One panel is multiplied by all
// blocks before the next one, which is fetched meanwhile: weights cross the memory bus once per call, or once per
// kChunkBytes of packed x.
//
// Every sum is taken in the same order however many rows, threads and tiles there are.
#pragma once

#include <cstdint>

#include "vector.h"

namespace tandem {

constexpr int kColumns = 32;  // two registers: 14 rows of sums leave four for operands
constexpr int kLanes = 16;    // of a cache line
constexpr int kGroup = 32;    // values along K that share a scale, in the integer formats

enum WeightFormat : int { kWeightFloat32 = 0, kWeightBfloat16 = 1, kWeightInt8 = 2, kWeightInt4 = 3 };

}  // namespace tandem

extern "C" {
struct LinearArgs {
    const void* x;        // [rows, in_features]
    void* y;              // [rows, out_features]
    const void* weights;  // panels, 64-byte aligned
    const float* bias;    // [out_features] or null
    int64_t rows, in_features, out_features;
    int64_t x_stride, y_stride;  // elements between rows
    int32_t format;              // WeightFormat
    int32_t element;             // ElementType of x and y; the format's own for float32 and bfloat16
    int32_t wide_scales;         // integer formats: scales and minima are float32, not float16
    int32_t reserved;
};
void tandem_linear(const LinearArgs* args);
}

namespace tandem {

// One block of rows times one panel, over a range of K.
struct Tile {
    const char* block;  // packed rows, from the range's first step on
    const char* panel;  // likewise
    long steps;         // of the range
    const char* ahead;  // what to fetch meanwhile, ahead_step bytes per step
    long ahead_step;
    float* partial;     // [rows, kColumns]: the sums so far, from one segment and range to the next
    bool first, last;   // range of K
    void* y;            // the tile's first result
    long y_stride;
    const float* bias;   // of the panel's first column, or null
    int element;         // ElementType of y
    __mmask16 lanes[2];  // which columns exist
};

// What a format brings. `tiles[n]` multiplies a block of n rows.
struct LinearKernel {
    using TileFunction = void (*)(const Tile&);
    int max_rows;
    long values_per_step;
    long panel_bytes_per_step;
    long row_bytes_per_step;
    void (*pack)(const LinearArgs& args, long first_row, long rows, char* block);
    const TileFunction* tiles;
};

const LinearKernel& dense_kernel(const LinearArgs& args);
const LinearKernel& integer_kernel(const LinearArgs& args);

// Asks for the lines of y before the sums are ready: stores that miss would hold up the next tile.
template <class Element, int kRows>
inline void fetch_results(const Tile& tile) {
    const char* y = static_cast<const char*>(tile.y);
    for (int row = 0; row < kRows; ++row) {
        __builtin_prefetch(y, 1);
        if (sizeof(Element) == 4) __builtin_prefetch(y + 64, 1);
        y += tile.y_stride * sizeof(Element);
    }
}

// What a tile does with the sums of a segment of K: keeps them, or adds bias and writes y. `Element` is float or bf16.
template <class Element, int kRows>
inline void finish_segment(const Tile& tile, __m512 (&sums)[kRows][2], bool first, bool last) {
    if (!first) {
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            sums[row][0] = _mm512_add_ps(sums[row][0], _mm512_load_ps(tile.partial + row * kColumns));
            sums[row][1] = _mm512_add_ps(sums[row][1], _mm512_load_ps(tile.partial + row * kColumns + 16));
        }
    }
    if (!last) {
#pragma GCC unroll 16
        for (int row = 0; row < kRows; ++row) {
            _mm512_store_ps(tile.partial + row * kColumns, sums[row][0]);
            _mm512_store_ps(tile.partial + row * kColumns + 16, sums[row][1]);
        }
        return;
    }
    __m512 bias[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    if (tile.bias) {
        bias[0] = load16(tile.bias, tile.lanes[0]);
        bias[1] = load16(tile.bias + 16, tile.lanes[1]);
    }
    Element* y = static_cast<Element*>(tile.y);
#pragma GCC unroll 16
    for (int row = 0; row < kRows; ++row) {
        store16(y + row * tile.y_stride, _mm512_add_ps(sums[row][0], bias[0]), tile.lanes[0]);
        store16(y + row * tile.y_stride + 16, _mm512_add_ps(sums[row][1], bias[1]), tile.lanes[1]);
    }
}

}  // namespace tandem
