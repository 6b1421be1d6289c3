// swiglu(gate, up) = silu(gate) up. There is no forward: two of PyTorch's own kernels compute it faster.
#include "elementwise.h"

namespace metakern::METAKERN_ISA {

template <class F>
void jvp(const Args& args) {
    elementwise<F, 4, 1>(args, [](const Vec<F>* in, Vec<F>* out) {
        const auto d = silu<F>(in[0]);
        out[0] = d.first * in[2] * in[1] + d.value * in[3];
    });
}

template <class F>
void vjp(const Args& args) {
    elementwise<F, 3, 2>(args, [](const Vec<F>* in, Vec<F>* out) {
        const auto d = silu<F>(in[0]);
        out[0] = in[2] * in[1] * d.first;
        out[1] = in[2] * d.value;
    });
}

template <class F>
void vjp_jvp(const Args& args) {
    elementwise<F, 6, 2>(args, [](const Vec<F>* in, Vec<F>* out) {
        const Vec<F> gate = in[0], up = in[1], t_gate = in[2], t_up = in[3], ct_y = in[4], t_ct_y = in[5];
        const auto d = silu<F>(gate);
        out[0] = (t_ct_y * up + ct_y * t_up) * d.first + ct_y * up * d.second * t_gate;
        out[1] = t_ct_y * d.value + ct_y * d.first * t_gate;
    });
}

extern const Kernel swiglu_kernels[] = {
    {"swiglu_jvp", "gate:* up:* t_gate:* t_up:* -> t_y:*", 0, {jvp<float>, jvp<double>}},
    {"swiglu_vjp", "gate:* up:* ct_y:* -> ct_gate:* ct_up:*", 0, {vjp<float>, vjp<double>}},
    {"swiglu_vjp_jvp",
     "gate:* up:* t_gate:* t_up:* ct_y:* t_ct_y:*? -> t_ct_gate:* t_ct_up:*",
     0,
     {vjp_jvp<float>, vjp_jvp<double>}},
    {}};

}  // namespace metakern::METAKERN_ISA
