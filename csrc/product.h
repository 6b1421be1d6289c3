// The batched matrix product, to the bindings and to csrc/cpu.
#pragma once

#include <cstdint>

namespace metakern {

// c [T, M, N] = add + scale a [T, M, K] b [T, K, N]. Strides are in elements; those of a and b are of T, rows and columns, one of
// the last two being 1; those of `add`, which may be null, are of T and rows. c is contiguous.
struct Product {
    const void *a, *b, *add;
    void* c;
    std::int64_t T, M, N, K;
    std::int64_t a_strides[3], b_strides[3], add_strides[2];
    double scale;
};

struct ProductKernels {
    void (*run[2])(const Product&, int threads);  // float32, float64
};

}  // namespace metakern
