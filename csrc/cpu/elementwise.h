// Elementwise kernels: a rule is a function of vectors, and every tensor is read or written once.
#pragma once

#include "rows.h"

namespace metakern::METAKERN_ISA {

// Applies rule(const Vec inputs[], Vec outputs[]) to the first `inputs` tensors and writes the `outputs` that follow.
// An absent input is zero.
template <class F, int inputs, int outputs, class Rule>
inline void elementwise(const Args& args, Rule rule) {
    const int64_t count = args.sizes[0];
    parallel_for((count + kUnit - 1) / kUnit, args.threads, [&](int64_t unit) {
        const int64_t begin = unit * kUnit, end = begin + kUnit < count ? begin + kUnit : count;
        each<F>(end - begin, [&](int64_t i, auto... n) {
            Vec<F> in[inputs], out[outputs];
            for (int j = 0; j < inputs; ++j) in[j] = maybe(args.tensor<F>(j), begin + i, n...);
            rule(in, out);
            for (int j = 0; j < outputs; ++j) store(args.tensor<F>(inputs + j) + begin + i, out[j], n...);
        });
    });
}

// The four rules of y = f(x) from derivatives<F>(x) = {f(x), f'(x), f''(x)}; what a rule does not use is not computed.
#define METAKERN_UNARY_RULES(f, derivatives)                                             \
    template <class F>                                                                   \
    void f##_forward(const Args& args) {                                                 \
        elementwise<F, 1, 1>(args, [](const Vec<F>* in, Vec<F>* out) {                   \
            out[0] = derivatives<F>(in[0]).value;                                        \
        });                                                                              \
    }                                                                                    \
    template <class F>                                                                   \
    void f##_vjp(const Args& args) {                                                     \
        elementwise<F, 2, 1>(args, [](const Vec<F>* in, Vec<F>* out) {                   \
            out[0] = in[1] * derivatives<F>(in[0]).first;                                \
        });                                                                              \
    }                                                                                    \
    template <class F>                                                                   \
    void f##_vjp_jvp(const Args& args) {                                                 \
        elementwise<F, 4, 1>(args, [](const Vec<F>* in, Vec<F>* out) {                   \
            const auto d = derivatives<F>(in[0]);                                        \
            out[0] = in[3] * d.first + in[2] * d.second * in[1];                         \
        });                                                                              \
    }
#define METAKERN_UNARY_TABLE(f)                                                                            \
    {#f "_forward", "x:* -> y:*", 0, {f##_forward<float>, f##_forward<double>}},                           \
    {#f "_jvp", "x:* t_x:* -> t_y:*", 0, {f##_vjp<float>, f##_vjp<double>}},                               \
    {#f "_vjp", "x:* ct_y:* -> ct_x:*", 0, {f##_vjp<float>, f##_vjp<double>}},                             \
    {#f "_vjp_jvp", "x:* t_x:* ct_y:* t_ct_y:*? -> t_ct_x:*", 0, {f##_vjp_jvp<float>, f##_vjp_jvp<double>}}

// y = f(x), y' and y''.
template <class F>
struct Derivatives {
    Vec<F> value, first, second;
};

// Beyond this size gates are open or shut to the last bit; products with their zero slopes must not meet an infinity.
constexpr float kShut = 1e4f;

// The derivatives of x s(w) for the sigmoid s and an inner function w of z, which is x bounded by kShut.
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
    return gated<F>(x, z, z, Vec<F>{} + F(1), Vec<F>{});
}

}  // namespace metakern::METAKERN_ISA
