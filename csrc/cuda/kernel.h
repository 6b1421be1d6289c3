// What a CUDA kernel is to the bindings: a row of a table, found by its name, which is that of a kernel of csrc/cpu.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <vector>

#include "plan.h"

namespace metakern::cuda {

// One call: the tensors in the order of the signature (null where absent), its sizes and scalars, and the stream.
struct Call {
    std::vector<void*> tensors;
    std::vector<std::int64_t> sizes;
    std::vector<double> scalars;
    void* stream;
    std::function<void*(std::size_t)> allocate;  // memory that stays until what the stream now holds is done
};

struct Kernel {
    const char* name;
    Plan (*run[2])(const Call&);  // float32, bfloat16; what was launched
};

// Hands out the tensors of a call in their order, but those that a variant of the kernel does not have.
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
