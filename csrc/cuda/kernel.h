// A CUDA kernel as the bindings see it: a row of a table, found by its name, which is that of a kernel of csrc/cpu.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#include "plan.h"

namespace metakern::cuda {

// The arguments of a call: the tensors in the order of the signature (null if absent), the sizes, the scalars, the
// stream.
struct Call {
    std::vector<void*> tensors;
    std::vector<std::int64_t> sizes;
    std::vector<double> scalars;
    void* stream;
    std::function<void*(std::size_t)> allocate;  // memory that no one else uses until the work of this call is done
};

struct Kernel {
    const char* name;
    Plan (*run[2])(const Call&);  // float32, bfloat16; returns what was launched
};

// Returns the tensors of a call one by one, in their order. next(false) returns null and skips nothing: it stands for a
// tensor that this variant of the kernel does not have.
template <class E>
class Tensors {
public:
    explicit Tensors(const Call& call) : call_(call) {}
    E* next(bool exists = true) { return exists ? static_cast<E*>(call_.tensors.at(given_++)) : nullptr; }
    void finish() const {
        if (given_ != call_.tensors.size()) throw std::invalid_argument("a kernel was given too many tensors");
    }

private:
    const Call& call_;
    std::size_t given_ = 0;
};

}  // namespace metakern::cuda
