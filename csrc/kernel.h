// A kernel as the bindings and the files of csrc/cpu see it: a row of a table, found by its name.
#pragma once

#include <cstdint>

namespace metakern {

// The arguments of a call: the tensors in the order of the signature (null if absent), the sizes and the scalars.
struct Args {
    void* const* tensors;
    const std::int64_t* sizes;
    const double* scalars;
    int threads;

    template <class F>
    F* tensor(int i) const {
        return static_cast<F*>(tensors[i]);
    }
};

// `signature` lists inputs and outputs with their shapes, as in "x:TND weight:TD? -> y:TND":
//
//     T N D    sizes, one letter each; Args::sizes has them in the order of first appearance
//     4H       four times a size
//     *        any shape, the same for all tensors of the kernel; Args::sizes then has the number of elements
//     i        after the sizes: int64 elements
//     ?        an input that may be absent
//     ?name    an output that is made only if the input `name` is present
//     =name    an output that takes the memory of the input `name`
struct Kernel {
    const char* name;
    const char* signature;
    int scalars;
    void (*run[2])(const Args&);  // float32, float64
};

}  // namespace metakern
