// Matrix products with register tiles: a tile of C, as large as the registers hold, is summed in the order of K, kDepth
// terms at a time. B is packed once in panels of two vectors of columns, [K][kPanel]; A is read in place.
//
// An element of C is the same sum whatever tile it falls into: results depend neither on how the rows are split nor on what
// else is computed.
#pragma once

#include <type_traits>
#include <utility>

#include "simd.h"

namespace metakern::METAKERN_ISA {

constexpr int kPanelVectors = 2;
template <class F>
constexpr int64_t kPanel = kPanelVectors * kLanes<F>;

template <class F>
inline int64_t panels(int64_t N) {
    return (N + kPanel<F> - 1) / kPanel<F>;
}

// A matrix to read: element (i, j) is at data[i * rows + j * columns]. One of these strides is 1.
template <class F>
struct Matrix {
    const F* data;
    int64_t rows, columns;
};

// A matrix to write: c = add + scale a b, where `add` may be absent, c itself, or one row for all (of row stride 0).
template <class F>
struct Output {
    F* data;
    int64_t rows;
    const F* add;
    int64_t add_rows;
    F scale = 1;

    Output at(int64_t i, int64_t j) const {
        return {data + i * rows + j, rows, add ? add + i * add_rows + j : add, add_rows, scale};
    }
};

// Transposes kLanes vectors of kLanes elements: log2(kLanes) perfect shuffles.
template <class F, std::size_t... i>
inline void transpose(Vec<F> (&v)[kLanes<F>], std::index_sequence<i...>) {
    constexpr int lanes = kLanes<F>;
    for (int stage = 1; stage < lanes; stage *= 2) {
        Vec<F> w[lanes];
#pragma GCC unroll 16
        for (int j = 0; j < lanes / 2; ++j) {
            w[2 * j] = __builtin_shufflevector(v[j], v[j + lanes / 2], (i / 2 + (i % 2) * lanes)...);
            w[2 * j + 1] = __builtin_shufflevector(v[j], v[j + lanes / 2], (lanes / 2 + i / 2 + (i % 2) * lanes)...);
        }
#pragma GCC unroll 16
        for (int j = 0; j < lanes; ++j) v[j] = w[j];
    }
}

// Packs panels [begin, end) of B [K, N]; columns beyond N are zero.
template <class F>
void pack(F* to, Matrix<F> b, int64_t K, int64_t N, int64_t begin, int64_t end);

// c [M, N] = add + scale a [M, K] b, for K rows of a packed b. `packed` is the number of rows that b was packed with,
// if it is more than K.
template <class F>
void multiply(int64_t M, int64_t N, int64_t K, Matrix<F> a, const F* b, Output<F> c, int64_t packed = 0);

// The same with operands rounded to bfloat16 and sums in float32 (bfloat16.cpp). Panels begin where those of float32 do;
// row k of a panel, for an even k, begins `row_bfloat16(k)` floats after the panel.
void pack_bfloat16(float* to, Matrix<float> b, int64_t K, int64_t N, int64_t begin, int64_t end);
void multiply_bfloat16(int64_t M, int64_t N, int64_t K, Matrix<float> a, const float* b, Output<float> c, int64_t packed = 0);
int64_t row_bfloat16(int64_t k);

// The products of a call: in F, or in bfloat16 if F is float and `bfloat16` is set.
template <class F>
struct Products {
    bool bfloat16;

    void pack(F* to, Matrix<F> b, int64_t K, int64_t N, int64_t begin, int64_t end) const {
        if constexpr (std::is_same_v<F, float>)
            if (bfloat16) return pack_bfloat16(to, b, K, N, begin, end);
        METAKERN_ISA::pack<F>(to, b, K, N, begin, end);
    }
    void multiply(int64_t M, int64_t N, int64_t K, Matrix<F> a, const F* b, Output<F> c, int64_t packed = 0) const {
        if constexpr (std::is_same_v<F, float>)
            if (bfloat16) return multiply_bfloat16(M, N, K, a, b, c, packed);
        METAKERN_ISA::multiply<F>(M, N, K, a, b, c, packed);
    }
    // Where row k of a panel begins, for an even k.
    int64_t row(int64_t k) const {
        if constexpr (std::is_same_v<F, float>)
            if (bfloat16) return row_bfloat16(k);
        return k * kPanel<F>;
    }
};

}  // namespace metakern::METAKERN_ISA
