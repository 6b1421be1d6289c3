// The four rules of a norm of rows, with a weight and a bias for each task:
//
//     n = (x - mean) rstd        y = weight n + bias        layer_norm: the row's mean; rstd = (variance + eps)^-1/2
//                                                           rms_norm:   mean = 0; rstd = (mean of x^2 + eps)^-1/2
//
// With q = t_rstd / rstd = -rstd m(n t_x), g = weight ct_y, and m(.) the mean over a row:
//
//     t_n     = rstd (t_x - t_mean) + q n                   t_y       = weight t_n + t_weight n + t_bias
//     ct_x    = rstd (g - m(g) - n m(g n))                  ct_weight = sum of ct_y n,   ct_bias = sum of ct_y
//     t_ct_x  = q ct_x + rstd (t_g - m(t_g) - t_n m(g n) - n m(t_g n + g t_n)),   t_g = weight t_ct_y + t_weight ct_y
//
// where rms_norm has neither m(g) nor m(t_g). A row is read from memory once: the second loop over it finds it in the
// cache.
#pragma once

#include "rows.h"

namespace metakern::METAKERN_ISA {

template <class F, bool centered>
struct Norm {
    using V = Vec<F>;

    static void forward(const Args& args) {
        Tensors<F> tensors(args);
        const F *x = tensors.next(), *weight = tensors.next(), *bias = tensors.next(centered);
        F *y = tensors.next(), *means = tensors.next(centered), *rstds = tensors.next();
        const Blocks blocks(args.sizes[0], args.sizes[1], args.sizes[2], args.threads);
        const int64_t D = blocks.D;
        const F eps = F(args.scalars[0]);
        blocks.run([&](int64_t t, int64_t, int64_t begin, int64_t end) {
            const F *w = row(weight, t, D), *b = row(bias, t, D);
            for (int64_t r = begin; r < end; ++r) {
                const F* x_r = x + r * D;
                V total{}, squares{};
                if (centered) each<F>(D, [&](int64_t i, auto... n) { total += load(x_r + i, n...); });
                const F mean = centered ? sum<F>(total) / F(D) : F(0);
                each<F>(D, [&](int64_t i, auto... n) {
                    const V centered_x = first<F>(load(x_r + i, n...) - mean, n...);
                    squares += centered_x * centered_x;
                });
                const F rstd = F(1) / root(sum<F>(squares) / F(D) + eps);
                each<F>(D, [&](int64_t i, auto... n) {
                    const V normal = (load(x_r + i, n...) - mean) * rstd;
                    store(y + r * D + i, scaled(w, i, normal, n...) + maybe(b, i, n...), n...);
                });
                if (centered) means[r] = mean;
                rstds[r] = rstd;
            }
        });
    }

    static void jvp(const Args& args) {
        Tensors<F> tensors(args);
        const F *x = tensors.next(), *weight = tensors.next();
        tensors.next(centered);
        const F *means = tensors.next(centered), *rstds = tensors.next();
        const F *t_x = tensors.next(), *t_weight = tensors.next(), *t_bias = tensors.next(centered);
        F *t_y = tensors.next(), *t_means = tensors.next(centered), *t_rstds = tensors.next();
        const Blocks blocks(args.sizes[0], args.sizes[1], args.sizes[2], args.threads);
        const int64_t D = blocks.D;
        blocks.run([&](int64_t t, int64_t, int64_t begin, int64_t end) {
            const F *w = row(weight, t, D), *t_w = row(t_weight, t, D), *t_b = row(t_bias, t, D);
            for (int64_t r = begin; r < end; ++r) {
                const F *x_r = x + r * D, *t_x_r = row(t_x, r, D);
                const F mean = centered ? means[r] : F(0), rstd = rstds[r];
                V total{}, along{};
                each<F>(D, [&](int64_t i, auto... n) {
                    const V t_x_i = maybe(t_x_r, i, n...);
                    if (centered) total += t_x_i;
                    along += t_x_i * ((load(x_r + i, n...) - mean) * rstd);
                });
                const F t_mean = sum<F>(total) / F(D), q = -rstd * sum<F>(along) / F(D);
                each<F>(D, [&](int64_t i, auto... n) {
                    const V normal = (load(x_r + i, n...) - mean) * rstd;
                    const V t_normal = (maybe(t_x_r, i, n...) - t_mean) * rstd + q * normal;
                    const V t_y_i = scaled(w, i, t_normal, n...) + maybe(t_w, i, n...) * normal + maybe(t_b, i, n...);
                    store(t_y + r * D + i, t_y_i, n...);
                });
                if (centered) t_means[r] = t_mean;
                t_rstds[r] = q * rstd;
            }
        });
    }

    static void vjp(const Args& args) {
        Tensors<F> tensors(args);
        const F *x = tensors.next(), *weight = tensors.next();
        tensors.next(centered);
        const F *means = tensors.next(centered), *rstds = tensors.next(), *ct_y = tensors.next();
        F *ct_x = tensors.next(), *ct_weight = tensors.next(), *ct_bias = tensors.next(centered);
        const Blocks blocks(args.sizes[0], args.sizes[1], args.sizes[2], args.threads);
        const int64_t D = blocks.D;
        const TaskSums<F> weights(ct_weight, blocks), biases(ct_bias, blocks);
        blocks.run([&](int64_t t, int64_t b, int64_t begin, int64_t end) {
            const F* w = row(weight, t, D);
            F *ct_w = weights.of(t, b), *ct_b = biases.of(t, b);
            for (int64_t r = begin; r < end; ++r) {
                const F *x_r = x + r * D, *ct_r = ct_y + r * D;
                const F mean = centered ? means[r] : F(0), rstd = rstds[r];
                V total{}, along{};
                each<F>(D, [&](int64_t i, auto... n) {
                    const V ct = load(ct_r + i, n...), normal = (load(x_r + i, n...) - mean) * rstd;
                    const V g = scaled(w, i, ct, n...);
                    if (centered) total += g;
                    along += g * normal;
                    if (ct_w) add(ct_w + i, ct * normal, n...);
                    if (ct_b) add(ct_b + i, ct, n...);
                });
                const F g_mean = sum<F>(total) / F(D), g_along = sum<F>(along) / F(D);
                each<F>(D, [&](int64_t i, auto... n) {
                    const V normal = (load(x_r + i, n...) - mean) * rstd;
                    const V g = scaled(w, i, load(ct_r + i, n...), n...);
                    store(ct_x + r * D + i, (g - g_mean - normal * g_along) * rstd, n...);
                });
            }
        });
        weights.finish();
        biases.finish();
    }

    static void vjp_jvp(const Args& args) {
        Tensors<F> tensors(args);
        const F *x = tensors.next(), *weight = tensors.next();
        tensors.next(centered);
        const F *means = tensors.next(centered), *rstds = tensors.next();
        const F *t_x = tensors.next(), *t_weight = tensors.next();
        tensors.next(centered);
        const F *t_means = tensors.next(centered), *t_rstds = tensors.next();
        const F *ct_y = tensors.next(), *t_ct_y = tensors.next();
        F *t_ct_x = tensors.next(), *t_ct_weight = tensors.next(), *t_ct_bias = tensors.next(centered);
        const Blocks blocks(args.sizes[0], args.sizes[1], args.sizes[2], args.threads);
        const int64_t D = blocks.D;
        const TaskSums<F> weights(t_ct_weight, blocks), biases(t_ct_bias, blocks);
        blocks.run([&](int64_t t, int64_t b, int64_t begin, int64_t end) {
            const F *w = row(weight, t, D), *t_w = row(t_weight, t, D);
            F *t_ct_w = weights.of(t, b), *t_ct_b = biases.of(t, b);
            for (int64_t r = begin; r < end; ++r) {
                const F *x_r = x + r * D, *t_x_r = row(t_x, r, D), *ct_r = ct_y + r * D, *t_ct_r = row(t_ct_y, r, D);
                const F mean = centered ? means[r] : F(0), t_mean = centered ? t_means[r] : F(0);
                const F rstd = rstds[r], q = t_rstds[r] / rstd;
                // n, t_n, g and t_g at i
                const auto terms = [&](int64_t i, auto... n) {
                    const V normal = (load(x_r + i, n...) - mean) * rstd, ct = load(ct_r + i, n...);
                    const V t_normal = (maybe(t_x_r, i, n...) - t_mean) * rstd + q * normal;
                    const V t_ct = maybe(t_ct_r, i, n...);
                    return Terms{ct, t_ct, normal, t_normal, scaled(w, i, ct, n...),
                                 scaled(w, i, t_ct, n...) + maybe(t_w, i, n...) * ct};
                };
                V total{}, along{}, t_total{}, t_along{};
                each<F>(D, [&](int64_t i, auto... n) {
                    const Terms a = terms(i, n...);
                    if (centered) total += a.g, t_total += a.t_g;
                    along += a.g * a.normal;
                    t_along += a.t_g * a.normal + a.g * a.t_normal;
                    if (t_ct_w) add(t_ct_w + i, a.t_ct * a.normal + a.ct * a.t_normal, n...);
                    if (t_ct_b) add(t_ct_b + i, a.t_ct, n...);
                });
                const F g_mean = sum<F>(total) / F(D), g_along = sum<F>(along) / F(D);
                const F t_g_mean = sum<F>(t_total) / F(D), t_g_along = sum<F>(t_along) / F(D);
                each<F>(D, [&](int64_t i, auto... n) {
                    const Terms a = terms(i, n...);
                    const V still = a.g - g_mean - a.normal * g_along;
                    const V moved = a.t_g - t_g_mean - a.t_normal * g_along - a.normal * t_g_along;
                    store(t_ct_x + r * D + i, (q * still + moved) * rstd, n...);
                });
            }
        });
        weights.finish();
        biases.finish();
    }

private:
    struct Terms {
        V ct, t_ct, normal, t_normal, g, t_g;
    };

    static const F* row(const F* p, int64_t r, int64_t D) { return p ? p + r * D : nullptr; }

    // weight v; an absent weight is one.
    template <class... Lanes>
    static V scaled(const F* weight, int64_t i, V v, Lanes... n) {
        return weight ? load(weight + i, n...) * v : v;
    }
};

}  // namespace metakern::METAKERN_ISA
