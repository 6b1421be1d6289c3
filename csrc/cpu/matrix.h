// Matrix products with register tiles: a tile of C, as large as the registers hold, is summed in the order of K, kDepth
// terms at a time. B is packed once in panels of two vectors of columns, [K][kPanel]; A is read in place.
//
// An element of C is the same sum whatever tile it falls into: results depend neither on how the rows are split nor on what
// else is computed.
#pragma once

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

// Packs panels [begin, end) of B [K, N]; columns beyond N are zero.
template <class F>
void pack(F* to, Matrix<F> b, int64_t K, int64_t N, int64_t begin, int64_t end);

// c [M, N] = add + scale a [M, K] b, for K rows of a packed b. `packed` is the number of rows that b was packed with,
// if it is more than K.
template <class F>
void multiply(int64_t M, int64_t N, int64_t K, Matrix<F> a, const F* b, Output<F> c, int64_t packed = 0);

}  // namespace metakern::METAKERN_ISA
