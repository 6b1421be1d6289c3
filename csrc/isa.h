// The kernels of csrc/cpu, compiled once for every instruction set, and those that this machine runs.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "kernel.h"
#include "pass.h"
#include "product.h"

namespace metakern {

// A kernel and what its signature says of its tensors.
struct Entry {
    Kernel kernel;
    std::vector<bool> optional;
    std::size_t sizes = 0;

    explicit Entry(const Kernel& k);
};

// The kernels of an instruction set.
struct Isa {
    std::string name;
    std::vector<Entry> kernels;
    ProductKernels product;
    PassKernels pass;
};

// Those that this machine has, best first.
const std::vector<Isa>& isas();

// The one in use: the best, or what set_isa says, which raises std::invalid_argument for a name that is not among them.
const Isa& isa_in_use();
void set_isa(const std::string& name);

}  // namespace metakern
