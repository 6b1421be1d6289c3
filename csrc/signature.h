// The signature of a kernel: its tensors by name, with the shape, dtype and memory that each must have.
//
// "x:TND weight:TD? target:TNi -> y:TND ct_weight:TD?weight" reads
//
//     x:TND               a tensor [T, N, D]; the first tensor with a size sets it, the others must agree;
//                         Args::sizes has the sizes in the order of first appearance
//     gates:TBL4H         a last dimension of four times the size H
//     w_own:T6            a last dimension of size 6
//     x:*                 any shape, the same for all tensors of the kernel; Args::sizes has the number of elements
//     target:TNi          int64; all other tensors share one floating-point dtype
//     weight:TD?          an input that may be absent
//     ct_weight:TD?weight an output that is made only where the input `weight` is given
//     gates:TBLG=u        an output that takes the memory of the input `u`, which the call uses up
//
// This is the only place that reads it. Python gets the parts from `metakern._C.signatures`.
#pragma once

#include <cstddef>
#include <string>
#include <utility>
#include <vector>

namespace metakern {

struct Argument {
    std::string name;
    std::vector<std::pair<int, std::string>> dims;  // a multiple of a size, or of "1", for each dimension; none: any shape
    bool indices = false;
    bool optional = false;
    std::string given_with;    // the input without which an output is not made
    std::string memory;  // the input whose memory an output takes
};

struct Signature {
    std::vector<Argument> inputs, outputs;
    std::size_t sizes = 0;  // different ones; `*` counts as one

    explicit Signature(const std::string& text);  // std::invalid_argument where the text can't be read

    std::size_t tensors() const { return inputs.size() + outputs.size(); }
    // Whether a call may give no memory for tensor i, counted over inputs and then outputs.
    bool optional(std::size_t i) const {
        return i < inputs.size() ? inputs[i].optional : outputs[i - inputs.size()].optional;
    }
};

}  // namespace metakern
