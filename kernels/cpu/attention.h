// What the two halves of paged attention share: the arguments, rows, and exp2 as softmax needs it.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <memory>

#include "vector.h"

namespace tandem {

// Mirrored by kernels/cpu/ops.py. Strides count elements; see `Ops.paged_attention` for the rest.
struct AttentionArgs {
    const void* q;  // [tokens, heads, head_dim], the last dimension contiguous
    void* output;   // like q, contiguous
    float* lse;     // [tokens, heads]
    const void* kv;  // [num_blocks, 2, block_size, kv_heads, head_dim], contiguous
    const int64_t* query_starts;     // [rows + 1]
    const int64_t* context_lengths;  // [rows]
    const int64_t* block_tables;     // [rows, table_stride]
    const float* sink_logits;        // [heads] or null
    int64_t q_token_stride;
    int64_t q_head_stride;
    int64_t rows;
    int64_t table_stride;
    int64_t block_size;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t window;       // as large as can be where there is none
    int64_t sink_tokens;
    float scale;          // > 0
    float soft_cap;       // 0: none
    int64_t dtype;        // ElementType
};

struct AttentionRow {
    long query_start, query_count, context;
    const int64_t* table;

    AttentionRow(const AttentionArgs& args, long row)
        : query_start(args.query_starts[row]),
          query_count(args.query_starts[row + 1] - query_start),
          context(args.context_lengths[row]),
          table(args.block_tables + row * args.table_stride) {}

    long start() const { return context - query_count; }
};

// Where the K of positions [begin, end) lies, `offset` words into each token's [kv_heads, head_dim] of `key_words`.
inline void find_keys(const AttentionArgs& args, const AttentionRow& row, long begin, long end, long key_words,
                      long offset, const uint32_t** to) {
    long block = begin / args.block_size, place = begin % args.block_size;
    for (; begin < end; ++block, place = 0) {
        const long count = std::min(args.block_size - place, end - begin);
        const uint32_t* const first = static_cast<const uint32_t*>(args.kv) +
                                      (row.table[block] * 2 * args.block_size + place) * key_words + offset;
        for (long key = 0; key < count; ++key) *to++ = first + key * key_words;
        begin += count;
    }
}

// Memory that a thread keeps, because the next layer wants as much.
class AttentionScratch {
  public:
    template <class T>
    T* take(long count) {
        const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
        if (bytes > size_) {
            memory_.reset(std::aligned_alloc(4096, bytes));
            if (!memory_) std::abort();
            size_ = bytes;
        }
        return static_cast<T*>(memory_.get());
    }

  private:
    struct Free {
        void operator()(void* memory) const { std::free(memory); }
    };
    std::unique_ptr<void, Free> memory_;
    size_t size_ = 0;
};

// Kernels see K, V and q as words of 32 bits: a float32, or two neighbours in bfloat16.
template <class T>
constexpr long kPerWord = 4 / sizeof(T);

constexpr float kLog2E = 1.44269504f;
constexpr double kLn2 = 0.693147180559945309;

// Two finite stand-ins for -inf, so that no inf - inf arises: the maximum of no scores, and, far below it, the score
// of a key that a token does not see. 2 to the power of their difference is exactly 0.
constexpr float kNoMaximum = -1e30f;
constexpr float kHidden = -1e35f;

// 2^x. The polynomial approximates 2^f for f in [0, 1) with a relative error of 2e-9, below float32's rounding.
inline __m512 exp2_16(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
    __m512 p = _mm512_set1_ps(0x1.c72118p-13f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.461956p-10f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.3d28p-7f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.c685p-5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ebfd9ep-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62e42ap-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, x);  // p * 2^floor(x)
}

// The same with a relative error of 3e-6, for weights that bfloat16 will round to 4e-3.
inline __m512 exp2_16_coarse(__m512 x) {
    const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 p = _mm512_set1_ps(0x1.bb7cd4p-7f);
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.aa13f2p-5f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.ee798ap-3f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.62d166p-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0x1.00002cp+0f));
    return _mm512_scalef_ps(p, x);
}

// tanh: below 0.6 a continued fraction (exp would cancel there), above it 1 - 2 / (e^(2 |x|) + 1).
inline __m512 tanh16(__m512 x) {
    const __m512 square = _mm512_mul_ps(x, x);
    // x (945 + 105 x^2 + x^4) / (945 + 420 x^2 + 15 x^4)
    const __m512 above =
        _mm512_fmadd_ps(square, _mm512_add_ps(square, _mm512_set1_ps(105.0f)), _mm512_set1_ps(945.0f));
    const __m512 below = _mm512_fmadd_ps(
        square, _mm512_fmadd_ps(square, _mm512_set1_ps(15.0f), _mm512_set1_ps(420.0f)), _mm512_set1_ps(945.0f));
    const __m512 small = _mm512_div_ps(_mm512_mul_ps(x, above), below);
    const __m512 size = _mm512_min_ps(_mm512_abs_ps(x), _mm512_set1_ps(20.0f));
    const __m512 e = exp2_16(_mm512_mul_ps(size, _mm512_set1_ps(2 * kLog2E)));
    const __m512 large = _mm512_sub_ps(
        _mm512_set1_ps(1.0f), _mm512_div_ps(_mm512_set1_ps(2.0f), _mm512_add_ps(e, _mm512_set1_ps(1.0f))));
    const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
    return _mm512_mask_mov_ps(small, _mm512_cmp_ps_mask(size, _mm512_set1_ps(0.6f), _CMP_GT_OQ),
                              _mm512_or_ps(large, sign));
}

// Scores as the softmax takes them: raw products, times `factor` in the exponent of 2.
struct ScoreRule {
    float factor;        // scale * log2 e, or log2 e where a cap has already scaled
    float scale_by_cap;  // scale / soft_cap, or 0
    float cap;

    explicit ScoreRule(const AttentionArgs& args)
        : factor(args.soft_cap != 0 ? kLog2E : static_cast<float>(args.scale * 1.4426950408889634)),
          scale_by_cap(args.soft_cap != 0 ? args.scale / args.soft_cap : 0),
          cap(args.soft_cap) {}

    bool capped() const { return cap != 0; }
    __m512 capped(__m512 score) const {
        return _mm512_mul_ps(tanh16(_mm512_mul_ps(score, _mm512_set1_ps(scale_by_cap))), _mm512_set1_ps(cap));
    }
};

// The end of a softmax: `top` is the maximum and `sum` the sum of 2^(score - top), scores in powers of 2. Adds the
// head's sink, writes the log-sum-exp and returns what the weighted sum of values is to be multiplied with.
inline float finish_softmax(const AttentionArgs& args, long head, double top, double sum, float* lse) {
    double log2_sum = top + std::log2(sum);
    if (args.sink_logits != nullptr) {
        const double sink = args.sink_logits[head] * 1.4426950408889634;
        const double high = std::fmax(log2_sum, sink), low = std::fmin(log2_sum, sink);
        log2_sum = high + std::log2(1 + std::exp2(low - high));
    }
    *lse = static_cast<float>(log2_sum * kLn2);
    return static_cast<float>(std::exp2(top - log2_sum));
}

// One query tile of a row: tokens [first, first + count) of its new ones, for the heads of one KV head.
void prefill_tile(const AttentionArgs& args, const AttentionRow& row, long first, long count, long kv_head);

// How many tokens a query tile holds.
long prefill_tile_tokens(const AttentionArgs& args);

// A row of one new token is computed in parts of its context. How many depends on its own context alone, never on the
// batch or the threads, so that a row's result does not either.
long decode_parts(const AttentionArgs& args, const AttentionRow& row);

// Floats that one part leaves behind for `decode_merge`; unused where a row has a single part.
long decode_partial_floats(const AttentionArgs& args);

void decode_part(const AttentionArgs& args, const AttentionRow& row, long part, long parts, float* partials);
void decode_merge(const AttentionArgs& args, const AttentionRow& row, long parts, const float* partials);

}  // namespace tandem
