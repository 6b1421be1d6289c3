// The kernels of csrc/cpu, compiled once for each instruction set, and the choice of the instruction set.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "kernel.h"
#include "pass.h"
#include "product.h"

namespace metakern {

// A kernel, and what its signature says: for each tensor whether it is optional, and the number of sizes.
struct Entry {
    Kernel kernel;
    std::vector<bool> optional;
    std::size_t sizes = 0;

    explicit Entry(const Kernel& k);
};

// All kernels for one instruction set.
struct Isa {
    std::string name;
    std::vector<Entry> kernels;
    ProductKernels product;
    PassKernels pass;
};

// The instruction sets that this machine has, best first.
const std::vector<Isa>& isas();

// The instruction set in use: the best one, or the one chosen by set_isa, which throws std::invalid_argument for a name
// that is not in isas().
const Isa& isa_in_use();
void set_isa(const std::string& name);

}  // namespace metakern
