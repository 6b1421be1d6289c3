// A kernel as the bindings and the files of csrc/cpu see it: a row of a table, found by its name.
#pragma once

#include <cstdint>

namespace metakern {

// The arguments of a call: the tensors in the order of the signature (null if absent), the sizes and the scalars. With
// `bfloat16`, float32 kernels round the operands of their matrix products to bfloat16; all else stays float32.
struct Args {
    void* const* tensors;
    const std::int64_t* sizes;
    const double* scalars;
    int threads;
    bool bfloat16;

    template <class F>
    F* tensor(int i) const {
        return static_cast<F*>(tensors[i]);
    }
};

// A kernel: its name `<op>_<rule>`, its signature (signature.h), how many scalars it takes, and its code.
struct Kernel {
    const char* name;
    const char* signature;
    int scalars;
    void (*run[2])(const Args&);  // float32, float64
};

}  // namespace metakern
