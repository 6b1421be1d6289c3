// gelu(x) = x Phi(x), and its tanh form x (1 + tanh(u)) / 2 = x s(2u) with u = sqrt(2/pi) (x + 0.044715 x^3).
// The first form has only the rule vjp_jvp here: its first-order rules are PyTorch's own kernels.
#include "elementwise.h"

namespace metakern::METAKERN_ISA {

template <class F>
inline Derivatives<F> gelu_tanh(Vec<F> x) {
    constexpr F a = F(0.044715), c = F(1.5957691216057308);  // 2 sqrt(2/pi)
    const Vec<F> z = clamp<F>(x, -kShut, kShut), square = z * z;
    return gated<F>(x, z, c * z * (F(1) + a * square), c * (F(1) + 3 * a * square), 6 * a * c * z);
}

template <class F>
void gelu_tanh_forward(const Args& args) {
    elementwise<F, 1, 1>(args, [](const Vec<F>* in, Vec<F>* out) { out[0] = gelu_tanh<F>(in[0]).value; });
}

// Both jvp and vjp: the Jacobian is diagonal, so they are the same product.
template <class F>
void gelu_tanh_slope(const Args& args) {
    elementwise<F, 2, 1>(args, [](const Vec<F>* in, Vec<F>* out) { out[0] = in[1] * gelu_tanh<F>(in[0]).first; });
}

extern const Kernel gelu_kernels[] = {
    {"gelu_vjp_jvp",
     "x:* t_x:* ct_y:* t_ct_y:*? -> t_ct_x:*",
     0,
     {curvature<float, gelu<float>>, curvature<double, gelu<double>>}},
    {"gelu_tanh_forward", "x:* -> y:*", 0, {gelu_tanh_forward<float>, gelu_tanh_forward<double>}},
    {"gelu_tanh_jvp", "x:* t_x:* -> t_y:*", 0, {gelu_tanh_slope<float>, gelu_tanh_slope<double>}},
    {"gelu_tanh_vjp", "x:* ct_y:* -> ct_x:*", 0, {gelu_tanh_slope<float>, gelu_tanh_slope<double>}},
    {"gelu_tanh_vjp_jvp",
     "x:* t_x:* ct_y:* t_ct_y:*? -> t_ct_x:*",
     0,
     {curvature<float, gelu_tanh<float>>, curvature<double, gelu_tanh<double>>}},
    {}};

}  // namespace metakern::METAKERN_ISA
