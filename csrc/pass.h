// A pass over tensors of any strides: the instruction of an elementwise operation, a sum, a copy.
#pragma once

#include <cstdint>

namespace metakern {

constexpr int kMostDims = 6, kMostOperands = 4;

enum PassType { kFloat32, kFloat64, kInt64, kBool, kPassTypes };

// out = f(in[0], in[1], …) of each element. Tensors and their strides, in elements: the result's first. Sizes from the
// outermost dimension. `sum` is over the last `reduced` dimensions or, where negative, over so many before the last one.
struct Pass {
    int dims, reduced;
    std::int64_t sizes[kMostDims];
    std::int64_t strides[kMostOperands][kMostDims];
    void* tensors[kMostOperands];
    double scalars[2];
};

// Every pass by name, and its inputs. `s` and `t` are its scalars.
#define METAKERN_PASSES(X)                                                                                         \
    X(copy, 1)               /* x */                                                                               \
    X(from_float32, 1)       /* x, of another type than the result; and so on */                                   \
    X(from_float64, 1)                                                                                             \
    X(from_int64, 1)                                                                                               \
    X(from_bool, 1)                                                                                                \
    X(fill, 0)               /* s */                                                                               \
    X(add, 2)                /* x + s y */                                                                         \
    X(mul, 2)                /* x y */                                                                             \
    X(div, 2)                /* x / y */                                                                           \
    X(affine, 1)             /* s x + t */                                                                         \
    X(reciprocal, 1)         /* s / x */                                                                           \
    X(power, 1)              /* x^s */                                                                             \
    X(square, 1)                                                                                                   \
    X(sqrt, 1)                                                                                                     \
    X(rsqrt, 1)                                                                                                    \
    X(exp, 1)                                                                                                      \
    X(relu, 1)                                                                                                     \
    X(threshold_backward, 2) /* ct where x > s, else 0 */                                                          \
    X(tanh, 1)                                                                                                     \
    X(tanh_backward, 2)      /* ct (1 - y²) */                                                                     \
    X(sigmoid, 1)                                                                                                  \
    X(sigmoid_backward, 2)   /* ct y (1 - y) */                                                                    \
    X(gelu, 1)                                                                                                     \
    X(gelu_backward, 2)      /* of ct and x */                                                                     \
    X(silu, 1)                                                                                                     \
    X(silu_backward, 2)      /* of ct and x */                                                                     \
    X(sum, 1)                /* s times it */                                                                      \
    X(where, 3)              /* of a mask, x and y */                                                              \
    X(eq, 1)                 /* x = s, a mask; and so on */                                                        \
    X(ne, 1)                                                                                                       \
    X(lt, 1)                                                                                                       \
    X(le, 1)                                                                                                       \
    X(gt, 1)                                                                                                       \
    X(ge, 1)                                                                                                       \
    X(logical_and, 2)                                                                                              \
    X(logical_or, 2)                                                                                               \
    X(logical_not, 1)

enum PassName {
#define METAKERN_NAME(name, inputs) k_##name,
    METAKERN_PASSES(METAKERN_NAME)
#undef METAKERN_NAME
    kPassNames
};

struct PassKernels {
    void (*run[kPassNames][kPassTypes])(const Pass&);  // null where there is none for the type
    // to[index[i]] += scale from[i] of rows of D elements, float32 and float64
    void (*add_rows[2])(void* to, const void* from, const std::int64_t* index, std::int64_t rows, std::int64_t D,
                        double scale);
};

}  // namespace metakern
