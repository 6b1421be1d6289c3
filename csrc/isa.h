// The kernels of csrc/cpu, compiled once for each instruction set, and the choice of the instruction set.
#pragma once

#include <string>
#include <vector>

#include "kernel.h"
#include "instructions.h"
#include "peak.h"
#include "product.h"
#include "signature.h"

namespace metakern {

// A kernel, with its signature read.
struct Entry {
    Kernel kernel;
    Signature signature;

    explicit Entry(const Kernel& k) : kernel(k), signature(k.signature) {}
};

// All kernels for one instruction set.
struct Isa {
    std::string name;
    std::vector<Entry> kernels;
    ProductKernels product;
    InstructionKernels instructions;
    PeakKernels peak;
};

// The instruction sets that this machine has, best first.
const std::vector<Isa>& isas();

// The instruction set in use: the best one, or the one chosen by set_isa, which throws std::invalid_argument for a name
// that is not in isas().
const Isa& isa_in_use();
void set_isa(const std::string& name);

}  // namespace metakern
