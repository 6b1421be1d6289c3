// The batched matrix product as the bindings and csrc/cpu see it.
#pragma once

#include <cstdint>

namespace metakern {

// c [T, M, N] = add + scale a [T, M, K] b [T, K, N]. Strides are in elements. Those of a and b are
// over T, rows and columns, and one of the last two is 1. `add` may be null; its strides are over T and rows, and its
// columns are contiguous. c is contiguous. With `bfloat16`, a and b are float32 matrices whose elements are rounded to
// bfloat16, and the sums are float32.
//
// `rows` [T, M] and `terms` [T, K] may be null. Where an entry of them equals `ignored`, that row of c may be computed as if
// that of a were zero, or that term of the sums be left out.
struct Product {
    const void *a, *b, *add;
    void* c;
    std::int64_t T, M, N, K;
    std::int64_t a_strides[3], b_strides[3], add_strides[2];
    double scale;
    bool bfloat16;
    const std::int64_t *rows, *terms;
    std::int64_t ignored;
};

struct ProductKernels {
    void (*run[2])(const Product&, int threads);  // float32, float64
};

}  // namespace metakern
