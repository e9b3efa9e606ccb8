// What stands between a model's matrix products: norms, rotary embeddings with the write to the cache, SwiGLU.
//
// All are bound by memory or, for few tokens, by the call itself: those run in the caller's thread.
#include <immintrin.h>

#include <cmath>
#include <cstdint>

#include "pool.h"
#include "vector.h"

namespace tandem {

// Mirrored by kernels/cpu/ops.py, as are the others. Strides count elements; the last dimension is contiguous.
struct RmsNormArgs {
    const void* x;         // [outer, inner, n]
    const void* residual;  // like x, or null
    const void* weight;    // [n]
    void* output;          // like x, contiguous
    void* sum;             // x + residual, contiguous; unused without a residual
    int64_t outer;
    int64_t inner;
    int64_t n;
    int64_t x_outer_stride;
    int64_t x_inner_stride;
    int64_t residual_outer_stride;
    int64_t residual_inner_stride;
    double eps;
    int64_t dtype;  // ElementType
};

struct RopeStoreArgs {
    const void* q;             // [tokens, heads, head_dim]
    const void* k;             // [tokens, kv_heads, head_dim]
    const void* v;             // like k
    const int64_t* positions;  // [tokens]
    const float* table;        // [max_context, head_dim]: cosines, then sines
    void* kv;                  // [num_blocks, 2, block_size, kv_heads, head_dim]
    const int64_t* slots;      // [tokens]
    void* output;              // like q, contiguous
    int64_t tokens;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t block_size;
    int64_t q_token_stride;
    int64_t q_head_stride;
    int64_t k_token_stride;
    int64_t k_head_stride;
    int64_t v_token_stride;
    int64_t v_head_stride;
    int64_t dtype;
};

struct SiluMulArgs {
    const void* gate_up;  // [tokens, 2 * n]
    void* output;         // [tokens, n]
    int64_t tokens;
    int64_t n;
    int64_t stride;
    int64_t dtype;
};

namespace {

// Elements below which waking other threads costs more than they save: some 4 microseconds of work.
constexpr long kAloneElements = 16384;

template <class F>
void for_rows(long rows, long row_elements, F&& body) {
    if (rows * row_elements <= kAloneElements) {
        for (long row = 0; row < rows; ++row) body(row);
    } else {
        parallel_ranges(rows, [&](long begin, long end, int) {
            for (long row = begin; row < end; ++row) body(row);
        });
    }
}

template <class T>
void norm_row(const T* x, const T* residual, const T* weight, T* output, T* sum, long n, double eps) {
    __m512 squares = _mm512_setzero_ps(), squares2 = _mm512_setzero_ps();
    const T* values = x;
    if (residual != nullptr) {
        for (long i = 0; i < n; i += 16) {
            const __mmask16 lanes = first_lanes(n - i);
            store16(sum + i, _mm512_add_ps(load16(x + i, lanes), load16(residual + i, lanes)), lanes);
        }
        values = sum;  // as rounded: what later layers add to is what this one normalises
    }
    for (long i = 0; i < n; i += 32) {
        const __m512 a = load16(values + i, first_lanes(n - i)), b = load16(values + i + 16, first_lanes(n - i - 16));
        squares = _mm512_fmadd_ps(a, a, squares);
        squares2 = _mm512_fmadd_ps(b, b, squares2);
    }
    const double mean = static_cast<double>(sum16(_mm512_add_ps(squares, squares2))) / n;
    const __m512 factor = _mm512_set1_ps(static_cast<float>(1 / std::sqrt(mean + eps)));
    for (long i = 0; i < n; i += 16) {
        const __mmask16 lanes = first_lanes(n - i);
        const __m512 normed = _mm512_mul_ps(load16(values + i, lanes), factor);
        store16(output + i, _mm512_mul_ps(normed, load16(weight + i, lanes)), lanes);
    }
}

template <class T>
void rms_norm(const RmsNormArgs& args) {
    for_rows(args.outer * args.inner, args.n, [&](long row) {
        const long outer = row / args.inner, inner = row % args.inner;
        const T* const x = static_cast<const T*>(args.x) + outer * args.x_outer_stride + inner * args.x_inner_stride;
        const T* residual = static_cast<const T*>(args.residual);
        if (residual) residual += outer * args.residual_outer_stride + inner * args.residual_inner_stride;
        T* const sum = args.sum == nullptr ? nullptr : static_cast<T*>(args.sum) + row * args.n;
        norm_row(x, residual, static_cast<const T*>(args.weight), static_cast<T*>(args.output) + row * args.n, sum,
                 args.n, args.eps);
    });
}

// to = from turned by the angles of `turn` [half cosines, half sines]: pairs are elements i and i + half.
template <class T>
void rotate(const T* from, const float* turn, T* to, long half) {
    for (long i = 0; i < half; i += 16) {
        const __mmask16 lanes = first_lanes(half - i);
        const __m512 cosine = load16(turn + i, lanes), sine = load16(turn + half + i, lanes);
        const __m512 first = load16(from + i, lanes), second = load16(from + half + i, lanes);
        store16(to + i, _mm512_fmsub_ps(first, cosine, _mm512_mul_ps(second, sine)), lanes);
        store16(to + half + i, _mm512_fmadd_ps(second, cosine, _mm512_mul_ps(first, sine)), lanes);
    }
}

template <class T>
void rope_store(const RopeStoreArgs& args) {
    const long head_dim = args.head_dim, half = head_dim / 2;
    for_rows(args.tokens, (args.heads + 2 * args.kv_heads) * head_dim, [&](long token) {
        const float* const turn = args.table + args.positions[token] * head_dim;
        for (long head = 0; head < args.heads; ++head) {
            rotate(static_cast<const T*>(args.q) + token * args.q_token_stride + head * args.q_head_stride, turn,
                   static_cast<T*>(args.output) + (token * args.heads + head) * head_dim, half);
        }
        const long slot = args.slots[token];
        if (slot < 0) return;
        const long block = slot / args.block_size, place = slot % args.block_size;
        T* const key = static_cast<T*>(args.kv) + (block * 2 * args.block_size + place) * args.kv_heads * head_dim;
        T* const value = key + args.block_size * args.kv_heads * head_dim;
        for (long head = 0; head < args.kv_heads; ++head) {
            rotate(static_cast<const T*>(args.k) + token * args.k_token_stride + head * args.k_head_stride, turn,
                   key + head * head_dim, half);
            __builtin_memcpy(value + head * head_dim,
                             static_cast<const T*>(args.v) + token * args.v_token_stride + head * args.v_head_stride,
                             head_dim * sizeof(T));
        }
    });
}

template <class T>
void silu_mul(const SiluMulArgs& args) {
    const long n = args.n;
    for_rows(args.tokens, 2 * n, [&](long token) {
        const T* const gate = static_cast<const T*>(args.gate_up) + token * args.stride;
        T* const output = static_cast<T*>(args.output) + token * n;
        const __m512 one = _mm512_set1_ps(1.0f), sign = _mm512_set1_ps(-0.0f);
        for (long i = 0; i < n; i += 16) {
            const __mmask16 lanes = first_lanes(n - i);
            const __m512 x = load16(gate + i, lanes), up = load16(gate + n + i, lanes);
            const __m512 below = _mm512_add_ps(one, exp16(_mm512_xor_ps(x, sign)));
            store16(output + i, _mm512_mul_ps(_mm512_div_ps(x, below), up), lanes);
        }
    });
}

}  // namespace
}  // namespace tandem

extern "C" {

void tandem_rms_norm(const tandem::RmsNormArgs* args) {
    (args->dtype == tandem::kFloat32 ? tandem::rms_norm<float> : tandem::rms_norm<tandem::bf16>)(*args);
}

void tandem_rope_store(const tandem::RopeStoreArgs* args) {
    (args->dtype == tandem::kFloat32 ? tandem::rope_store<float> : tandem::rope_store<tandem::bf16>)(*args);
}

void tandem_silu_mul(const tandem::SiluMulArgs* args) {
    (args->dtype == tandem::kFloat32 ? tandem::silu_mul<float> : tandem::silu_mul<tandem::bf16>)(*args);
}

}
