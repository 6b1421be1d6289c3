// Products of float32 matrices in bfloat16 (matrix.h): the elements of both operands are rounded to bfloat16, to the
// nearest and ties to even, and their products are summed in float32.
//
// On CPUs with AVX-512 BF16 a panel holds pairs of rows, [(K + 1) / 2][kPanel][2], so that one instruction adds two
// products to each of 16 sums; it takes subnormal numbers as zero. On other CPUs a panel holds rounded float32, and the
// float32 tiles multiply it with rounded rows of A: the same products, in another order of summation.
#include "matrix.h"

#include <utility>

#if defined(__AVX512F__)
#include <immintrin.h>
#define METAKERN_BFLOAT16 __attribute__((target("avx512bf16")))
#endif

namespace metakern::METAKERN_ISA {

namespace {

constexpr int64_t kDepth = 256;  // rows of B for which a strip of A is rounded at once

// The elements of x rounded to bfloat16. NaN stays NaN.
inline Vec<float> rounded(Vec<float> x) {
    Bits<float> bits;
    std::memcpy(&bits, &x, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    Vec<float> y;
    std::memcpy(&y, &bits, sizeof y);
    return x == x ? y : x;
}

void pack_rounded(float* to, Matrix<float> b, int64_t K, int64_t N, int64_t begin, int64_t end) {
    pack<float>(to, b, K, N, begin, end);
    for (float* p = to; p < to + (end - begin) * K * kPanel<float>; p += kLanes<float>) store(p, rounded(load(p)));
}

void multiply_rounded(int64_t M, int64_t N, int64_t K, Matrix<float> a, const float* b, Output<float> c, int64_t packed) {
    constexpr int64_t kBlock = 24;
    float block[kBlock * kDepth];
    int64_t k = 0;
    do {
        const int64_t depth = K - k < kDepth ? K - k : kDepth;
        for (int64_t i = 0; i < M; i += kBlock) {
            const int64_t rows = M - i < kBlock ? M - i : kBlock;
            const Matrix<float> part{block, a.columns == 1 ? kDepth : 1, a.columns == 1 ? 1 : kBlock};
            const int64_t lines = a.columns == 1 ? rows : depth, length = a.columns == 1 ? depth : rows;
            const int64_t from_line = a.columns == 1 ? a.rows : a.columns, to_line = a.columns == 1 ? kDepth : kBlock;
            for (int64_t l = 0; l < lines; ++l) {
                const float* from = a.data + i * a.rows + k * a.columns + l * from_line;
                each<float>(length, [&](int64_t x, auto... n) {
                    store(block + l * to_line + x, rounded(load(from + x, n...)), n...);
                });
            }
            multiply<float>(rows, N, depth, part, b + k * kPanel<float>, c.at(i, 0), packed);
        }
        k += kDepth;
        c.add = c.data;
        c.add_rows = c.rows;
    } while (k < K);
}

#if defined(METAKERN_BFLOAT16)

constexpr int kRows = 12;  // of a tile
constexpr int kLanes32 = 16;
constexpr int64_t kWide = 16;  // panels of B that stay in the L2 cache while all rows of A are multiplied with them

bool has_instructions() {
    static const bool has = __builtin_cpu_supports("avx512bf16");
    return has;
}

// Two neighbours along K as bfloat16, the first in the low half.
using Pair = std::uint32_t;

inline __mmask16 first_lanes(int64_t n) {
    return static_cast<__mmask16>(n >= kLanes32 ? 0xffff : n <= 0 ? 0 : tail_mask(n));
}

// Pairs (x_i, y_i) of the first n elements at x and y, and zeros. y may be null, for zeros.
METAKERN_BFLOAT16 inline __m512i pairs_of(const float* x, const float* y, __mmask16 lanes) {
    const __m512 first = _mm512_maskz_loadu_ps(lanes, x), second = y ? _mm512_maskz_loadu_ps(lanes, y) : __m512{};
    std::uint16_t order[2 * kLanes32];
    for (int i = 0; i < 2 * kLanes32; ++i) order[i] = static_cast<std::uint16_t>(i / 2 + i % 2 * kLanes32);
    return _mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// The pairs of n elements at x, up to 32 of them, and zeros.
METAKERN_BFLOAT16 inline __m512i pairs_along(const float* x, int64_t n) {
    const __mmask16 low = first_lanes(n), high = first_lanes(n - kLanes32);
    return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(high, x + kLanes32), _mm512_maskz_loadu_ps(low, x));
}

METAKERN_BFLOAT16 void pack_pairs(float* to, Matrix<float> b, int64_t K, int64_t N, int64_t begin, int64_t end) {
    const int64_t panel = K * kPanel<float>;
    if (b.columns == 1) {
        for (int64_t k = 0; k < K; k += 2)
            for (int64_t p = begin; p < end; ++p)
                for (int64_t v = 0; v < kPanelVectors; ++v) {
                    const int64_t j = p * kPanel<float> + v * kLanes32;
                    const float* x = b.data + k * b.rows + j;
                    const __m512i pairs = pairs_of(x, k + 1 < K ? x + b.rows : nullptr, first_lanes(N - j));
                    _mm512_storeu_si512(to + (p - begin) * panel + k / 2 * kPanel<float> + v * kLanes32, pairs);
                }
        return;
    }
    for (int64_t p = begin; p < end; ++p)
        for (int64_t v = 0; v < kPanelVectors; ++v) {
            const int64_t j = p * kPanel<float> + v * kLanes32, width = N - j < kLanes32 ? N - j : kLanes32;
            float* column = to + (p - begin) * panel + v * kLanes32;
            for (int64_t k = 0; k < K; k += 2 * kLanes32) {
                Vec<float> block[kLanes32];
#pragma GCC unroll 16
                for (int64_t i = 0; i < kLanes32; ++i)
                    block[i] = (Vec<float>)(i < width ? pairs_along(b.data + (j + i) * b.columns + k, K - k) : __m512i{});
                transpose<float>(block, std::make_index_sequence<kLanes32>());
#pragma GCC unroll 16
                for (int64_t i = 0; i < kLanes32; ++i)
                    if (k + 2 * i < K) store(column + (k / 2 + i) * kPanel<float>, block[i]);
            }
        }
}

// Computes a tile of R rows and P panels. A panel begins `next` floats after the one before. Pair (r, q) of A is at
// a[r * kDepth / 2 + q], or at a[q * kRows + r].
template <int R, int P, bool a_is_row_major>
METAKERN_BFLOAT16 inline void tile(const Pair* a, const float* b, int64_t next, int64_t pairs, Output<float> c,
                                   int64_t width) {
    constexpr int V = P * kPanelVectors;
    __m512 sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) sum[r][v] = __m512{};
    for (int64_t q = 0; q < pairs; ++q) {
        __m512bh row[V];
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v)
            row[v] = (__m512bh)_mm512_loadu_ps(b + (v / kPanelVectors) * next + q * kPanel<float> + (v % kPanelVectors) * kLanes32);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const auto x = (__m512bh)_mm512_set1_epi32(static_cast<int>(a_is_row_major ? a[r * kDepth / 2 + q] : a[q * kRows + r]));
#pragma GCC unroll 16
            for (int v = 0; v < V; ++v) sum[r][v] = _mm512_dpbf16_ps(sum[r][v], x, row[v]);
        }
    }
    __mmask16 lanes[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) lanes[v] = first_lanes(width - v * kLanes32);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int v = 0; v < V; ++v) {
            __m512 x = unfused(_mm512_set1_ps(c.scale) * sum[r][v]);
            if (c.add) x += _mm512_maskz_loadu_ps(lanes[v], c.add + r * c.add_rows + v * kLanes32);
            _mm512_mask_storeu_ps(c.data + r * c.rows + v * kLanes32, lanes[v], x);
        }
}

// Computes R rows of C. With few rows, a tile has more panels, to hide the latency of an addition.
template <int R, bool a_is_row_major>
METAKERN_BFLOAT16 void strip(const Pair* a, const float* b, int64_t next, int64_t pairs, int64_t N, Output<float> c) {
    constexpr int P = R <= 3 ? 4 : R <= 6 ? 2 : 1;
    int64_t j = 0;
    for (; j + (P - 1) * kPanel<float> < N; j += P * kPanel<float>, b += P * next)
        tile<R, P, a_is_row_major>(a, b, next, pairs, c.at(0, j), N - j);
    for (; j < N; j += kPanel<float>, b += next) tile<R, 1, a_is_row_major>(a, b, next, pairs, c.at(0, j), N - j);
}

using Strip = void (*)(const Pair*, const float*, int64_t, int64_t, int64_t, Output<float>);
template <bool a_is_row_major, std::size_t... r>
inline Strip strip_of(int64_t rows, std::index_sequence<r...>) {
    static constexpr Strip all[] = {strip<r + 1, a_is_row_major>...};
    return all[rows - 1];
}

METAKERN_BFLOAT16 void multiply_pairs(int64_t M, int64_t N, int64_t K, Matrix<float> a, const float* b, Output<float> c,
                                      int64_t packed) {
    const auto sizes = std::make_index_sequence<kRows>();
    const int64_t blocks = (M + kRows - 1) / kRows, wide = blocks > 1 ? kWide * kPanel<float> : N;
    alignas(64) Pair pairs[kRows * kDepth / 2];
    int64_t k = 0;
    do {  // once where K = 0: the sums are empty
        const int64_t depth = K - k < kDepth ? K - k : kDepth;
        for (int64_t j = 0; j < N; j += wide)
            for (int64_t i = 0, block = 0; block < blocks; ++block) {
                const int64_t rows = (M - i) / (blocks - block), width = N - j < wide ? N - j : wide;
                const float *from = a.data + i * a.rows + k * a.columns, *panel = b + j * packed + k / 2 * kPanel<float>;
                if (a.columns == 1)
                    for (int64_t r = 0; r < rows; ++r)
                        for (int64_t x = 0; x < depth; x += 2 * kLanes32)
                            _mm512_store_si512(pairs + (r * kDepth + x) / 2, pairs_along(from + r * a.rows + x, depth - x));
                else
                    for (int64_t x = 0; x < depth; x += 2) {
                        const float *first = from + x * a.columns, *second = x + 1 < depth ? first + a.columns : nullptr;
                        const __mmask16 lanes = first_lanes(rows);
                        _mm512_mask_storeu_epi32(pairs + x / 2 * kRows, lanes, pairs_of(first, second, lanes));
                    }
                const Strip run = a.columns == 1 ? strip_of<true>(rows, sizes) : strip_of<false>(rows, sizes);
                run(pairs, panel, packed * kPanel<float>, (depth + 1) / 2, width, c.at(i, j));
                i += rows;
            }
        k += kDepth;
        c.add = c.data;
        c.add_rows = c.rows;
    } while (k < K);
}

#else

constexpr bool has_instructions() { return false; }
constexpr auto pack_pairs = pack_rounded;
constexpr auto multiply_pairs = multiply_rounded;

#endif

}  // namespace

void pack_bfloat16(float* to, Matrix<float> b, int64_t K, int64_t N, int64_t begin, int64_t end) {
    (has_instructions() ? pack_pairs : pack_rounded)(to, b, K, N, begin, end);
}

void multiply_bfloat16(int64_t M, int64_t N, int64_t K, Matrix<float> a, const float* b, Output<float> c, int64_t packed) {
    (has_instructions() ? multiply_pairs : multiply_rounded)(M, N, K, a, b, c, packed ? packed : K);
}

int64_t row_bfloat16(int64_t k) { return (has_instructions() ? k / 2 : k) * kPanel<float>; }

}  // namespace metakern::METAKERN_ISA
