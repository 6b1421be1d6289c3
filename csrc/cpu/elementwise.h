// Elementwise kernels: a rule is a function of vectors, and every tensor is read or written once.
#pragma once

#include "rows.h"

namespace metakern::METAKERN_ISA {

// Applies rule(const Vec inputs[], Vec outputs[]) to the first `inputs` tensors and writes the `outputs` that follow.
// An absent input is zero.
template <class F, int inputs, int outputs, class Rule>
inline void elementwise(const Args& args, Rule rule) {
    const int64_t count = args.sizes[0];
    const F* from[inputs];
    F* to[outputs];
    for (int j = 0; j < inputs; ++j) from[j] = args.tensor<F>(j);
    for (int j = 0; j < outputs; ++j) to[j] = args.tensor<F>(inputs + j);
    parallel_for((count + kUnit - 1) / kUnit, args.threads, [=](int64_t unit) {
        const int64_t begin = unit * kUnit, end = begin + kUnit < count ? begin + kUnit : count;
        each<F>(end - begin, [=](int64_t i, auto... n) {
            Vec<F> in[inputs], out[outputs];
            for (int j = 0; j < inputs; ++j) in[j] = maybe(from[j], begin + i, n...);
            rule(in, out);
            for (int j = 0; j < outputs; ++j) store(to[j] + begin + i, out[j], n...);
        });
    });
}

// f(x), f'(x) and f''(x). The functions that return them are inlined, so that the compiler drops those that are not
// used.
template <class F>
struct Derivatives {
    Vec<F> value, first, second;
};

// vjp_jvp of y = f(x), from x, t_x, ct_y and t_ct_y.
template <class F, Derivatives<F> (*derivatives)(Vec<F>)>
void curvature(const Args& args) {
    elementwise<F, 4, 1>(args, [](const Vec<F>* in, Vec<F>* out) {
        const Derivatives<F> d = derivatives(in[0]);
        out[0] = in[3] * d.first + in[2] * d.second * in[1];
    });
}

// Beyond this absolute value a gate is 0 or 1 to the last bit. x is clamped to it, as the product of an infinite x and
// the gate's zero slope would be NaN.
constexpr float kShut = 1e4f;

// The derivatives of x s(w), for the sigmoid s and a function w of z, which is x clamped to [-kShut, kShut].
template <class F>
inline Derivatives<F> gated(Vec<F> x, Vec<F> z, Vec<F> w, Vec<F> w_first, Vec<F> w_second) {
    const Sigmoid<F> s = sigmoid<F>(w);
    const Vec<F> bend = s.slope * (F(1) - F(2) * s.value);
    return {x * s.value, s.value + z * s.slope * w_first,
            F(2) * s.slope * w_first + z * (bend * w_first * w_first + s.slope * w_second)};
}

template <class F>
inline Derivatives<F> silu(Vec<F> x) {
    const Vec<F> z = clamp<F>(x, -kShut, kShut);
    return gated<F>(x, z, z, splat(F(1)), Vec<F>{});
}

template <class F>
inline Derivatives<F> gelu(Vec<F> x) {
    const Vec<F> z = clamp<F>(x, -kShut, kShut);
    const Normal<F> n = normal<F>(z);
    return {x * n.distribution, n.distribution + z * n.density, n.density * (F(2) - z * z)};
}

}  // namespace metakern::METAKERN_ISA
