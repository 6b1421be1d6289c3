// The multiply-adds that measure the machine's peak rate, as the bindings and csrc/cpu see them.
#pragma once

namespace metakern {

// The rate of a matrix product cannot exceed that of its multiply-adds, if its operands are in registers already. `run`
// does at least `flop` floating-point operations in this way, on all threads at once, and returns how many it did.
struct PeakKernels {
    double (*run[3])(double flop, int threads);  // float32, float64, bfloat16 (null where the processor lacks it)
};

}  // namespace metakern
