// What a kernel is, to the bindings and to the files of csrc/cpu: a row of a table, found by its name.
#pragma once

#include <cstdint>

namespace metakern {

// One call: the tensors in the order of the signature (null where absent), its sizes and its scalars.
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

// `signature` reads "x:TND weight:TD? -> y:TND": a letter is a size, in the order of first appearance, `*` any one shape,
// `4H` four times a size, `i` after the sizes int64 elements, `?` a tensor that may be absent, `?name` an output made only beside that input,
// `=name` an output that takes the memory of that input.
struct Kernel {
    const char* name;
    const char* signature;
    int scalars;
    void (*run[2])(const Args&);  // float32, float64
};

}  // namespace metakern
