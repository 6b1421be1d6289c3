// The kernels of csrc/cpu, compiled once for every instruction set, and those that this machine runs.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"
#include "pass.h"
#include "product.h"
#include "signature.h"

namespace metakern {

// A kernel, with its signature read.
struct Entry {
    Kernel kernel;
    Signature signature;

    explicit Entry(const Kernel& k) : kernel(k), signature(k.signature) {}
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
