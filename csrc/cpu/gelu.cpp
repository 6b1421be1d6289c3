// gelu(x) = x Phi(x), and its tanh form x (1 + tanh(u)) / 2 = x s(2u) with u = sqrt(2/pi) (x + 0.044715 x^3).
#include "elementwise.h"

namespace metakern::METAKERN_ISA {

template <class F>
inline Derivatives<F> gelu(Vec<F> x) {
    const Vec<F> z = clamp<F>(x, -kShut, kShut);
    const Normal<F> n = normal<F>(z);
    return {x * n.distribution, n.distribution + z * n.density, n.density * (F(2) - z * z)};
}

template <class F>
inline Derivatives<F> gelu_tanh(Vec<F> x) {
    constexpr F a = F(0.044715), c = F(1.5957691216057308);  // 2 sqrt(2/pi)
    const Vec<F> z = clamp<F>(x, -kShut, kShut), square = z * z;
    return gated<F>(x, z, c * z * (F(1) + a * square), c * (F(1) + 3 * a * square), 6 * a * c * z);
}

METAKERN_UNARY_RULES(gelu, gelu)
METAKERN_UNARY_RULES(gelu_tanh, gelu_tanh)

extern const Kernel gelu_kernels[] = {METAKERN_UNARY_TABLE(gelu), METAKERN_UNARY_TABLE(gelu_tanh), {}};

}  // namespace metakern::METAKERN_ISA
