// The instructions of an executable over the elements of tensors of any strides: elementwise operations, sums, copies.
#pragma once

#include <cstdint>

namespace metakern {

constexpr int kMostDims = 6, kMostOperands = 4;

enum ElementType { kFloat32, kFloat64, kInt64, kBool, kElementTypes };

// out = f(in[0], in[1], …), element by element. Tensors and strides begin with the result's; strides are in elements,
// sizes from the outermost dimension on. `sum` reduces the last `reduced` dimensions or, if `reduced` is negative, the
// -`reduced` dimensions before the last one.
struct Instruction {
    int dims, reduced;
    std::int64_t sizes[kMostDims];
    std::int64_t strides[kMostOperands][kMostDims];
    void* tensors[kMostOperands];
    double scalars[2];
};

// Elementwise instructions of floats: name, number of inputs, and a formula of vectors x[0], x[1] of type V, with
// elements of type F, and scalars s, t. An operation of PyTorch whose arguments are all tensors is lowered to the
// instruction of its name, so that one line here is enough to add it.
#define METAKERN_ELEMENTWISE(X)                                          \
    X(copy, 1, x[0])                                                     \
    X(fill, 0, splat<F>(s))                                                  \
    X(add, 2, x[0] + s * x[1])                                           \
    X(mul, 2, x[0] * x[1])                                               \
    X(div, 2, x[0] / x[1])                                               \
    X(affine, 1, s * x[0] + t)                                           \
    X(reciprocal, 1, s / x[0])                                           \
    X(power, 1, power_of(x[0], s))                                       \
    X(square, 1, x[0] * x[0])                                            \
    X(sqrt, 1, by_lane(x[0], [](F lane) { return root(lane); }))         \
    X(rsqrt, 1, F(1) / by_lane(x[0], [](F lane) { return root(lane); })) \
    X(sin, 1, by_lane(x[0], [](F lane) { return sine(lane); }))          \
    X(cos, 1, by_lane(x[0], [](F lane) { return cosine(lane); }))        \
    X(exp, 1, METAKERN_ISA::exp<F>(x[0]))                                \
    X(expm1, 1, METAKERN_ISA::expm1<F>(x[0]))                            \
    X(log, 1, METAKERN_ISA::log<F>(x[0]))                                \
    X(log1p, 1, METAKERN_ISA::log1p<F>(x[0]))                            \
    X(erf, 1, METAKERN_ISA::erf<F>(x[0]))                                \
    X(tan, 1, by_lane(x[0], [](F lane) { return tangent(lane); }))       \
    X(atan, 1, by_lane(x[0], [](F lane) { return arctangent(lane); }))   \
    X(abs, 1, (x[0] < 0 ? -x[0] : x[0]) + 0) /* -0 becomes 0 */          \
    X(sign, 1, x[0] > 0 ? splat(F(1)) : x[0] < 0 ? splat(F(-1)) : V{})            \
    X(maximum, 2, x[0] != x[0] ? x[0] : x[0] > x[1] ? x[0] : x[1])       \
    X(minimum, 2, x[0] != x[0] ? x[0] : x[0] < x[1] ? x[0] : x[1])       \
    X(relu, 1, x[0] < 0 ? V{} : x[0]) /* NaN and -0 stay */               \
    X(threshold_backward, 2, x[1] <= s ? V{} : x[0])                     \
    X(tanh, 1, tanh_of<F>(x[0]))                                         \
    X(tanh_backward, 2, x[0] * (F(1) - x[1] * x[1]))                     \
    X(sigmoid, 1, METAKERN_ISA::sigmoid<F>(x[0]).value)                  \
    X(sigmoid_backward, 2, x[0] * x[1] * (F(1) - x[1]))                  \
    X(gelu, 1, METAKERN_ISA::gelu<F>(x[0]).value)                        \
    X(gelu_backward, 2, x[0] * METAKERN_ISA::gelu<F>(x[1]).first)        \
    X(silu, 1, METAKERN_ISA::silu<F>(x[0]).value)                        \
    X(silu_backward, 2, x[0] * METAKERN_ISA::silu<F>(x[1]).first)

// All others: name, number of inputs, and the types of the result and of the first input; further inputs have the
// instruction's own type.
constexpr ElementType kOwnType = kElementTypes;
#define METAKERN_OTHER_INSTRUCTIONS(X)                                                     \
    X(from_float32, 1, kOwnType, kFloat32)    /* x, from this type to its own; likewise */ \
    X(from_float64, 1, kOwnType, kFloat64)                                                 \
    X(from_int64, 1, kOwnType, kInt64)                                                     \
    X(from_bool, 1, kOwnType, kBool)                                                       \
    X(sum, 1, kOwnType, kOwnType)             /* times s */                                \
    X(running_max, 2, kOwnType, kOwnType)     /* the larger one, element after element */  \
    X(where, 3, kOwnType, kBool)              /* mask, x, y */                             \
    X(eq, 1, kBool, kOwnType)                 /* the mask x == s; likewise */              \
    X(ne, 1, kBool, kOwnType)                                                              \
    X(lt, 1, kBool, kOwnType)                                                              \
    X(le, 1, kBool, kOwnType)                                                              \
    X(gt, 1, kBool, kOwnType)                                                              \
    X(ge, 1, kBool, kOwnType)                                                              \
    X(eq_of, 2, kBool, kOwnType)              /* the mask x == y; likewise */              \
    X(ne_of, 2, kBool, kOwnType)                                                           \
    X(lt_of, 2, kBool, kOwnType)                                                           \
    X(le_of, 2, kBool, kOwnType)                                                           \
    X(gt_of, 2, kBool, kOwnType)                                                           \
    X(ge_of, 2, kBool, kOwnType)                                                           \
    X(logical_and, 2, kOwnType, kOwnType)                                                  \
    X(logical_or, 2, kOwnType, kOwnType)                                                   \
    X(logical_not, 1, kOwnType, kOwnType)

enum InstructionName {
#define METAKERN_NAME(name, ...) k_##name,
    METAKERN_ELEMENTWISE(METAKERN_NAME) METAKERN_OTHER_INSTRUCTIONS(METAKERN_NAME)
#undef METAKERN_NAME
    kInstructionNames
};

struct InstructionKernels {
    // null if the instruction does not take the type
    void (*run[kInstructionNames][kElementTypes])(const Instruction&);
    // to[index[i]] += scale from[i] of rows of D elements, float32 and float64
    void (*add_rows[2])(void* to, const void* from, const std::int64_t* index, std::int64_t rows, std::int64_t D,
                        double scale);
};

}  // namespace metakern
