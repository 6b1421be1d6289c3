// Cross-entropy, the mean over a task's kept tokens. With l the log-sum-exp of a row of logits z, p = exp(z - l), e the
// one-hot target, and s = 1 / (kept tokens of the task) where a token is kept, 0 where it is ignored:
//
//     y = sum of s (l - z[target])             t_l    = p . t_z,   t_y = sum of s (t_l - t_z[target])
//     ct_z = s ct_y (p - e)                    t_ct_z = s ct_y p (t_z - t_l) + s t_ct_y (p - e)
//
// The only tensor written of the size of the logits is a cotangent of them. The logits of ignored tokens are not read; their
// l and t_l are 0. As l is rounded, exp(z - l) is divided by its own sum, which gives p to full precision, however large
// the logits.
#include "rows.h"

namespace metakern::METAKERN_ISA {
namespace {

// The targets of all tasks, and the weight of each of a task's kept tokens in its mean. A target out of range counts as
// ignored, as it must never become an address.
template <class F>
class Targets {
public:
    Targets(const void* target, double ignored, const Blocks& blocks)
        : target_(static_cast<const int64_t*>(target)), ignored_(static_cast<int64_t>(ignored)), blocks_(blocks),
          share_(blocks.T * static_cast<int64_t>(sizeof(F))) {
        for (int64_t t = 0; t < blocks.T; ++t) {
            int64_t kept = 0;
            for (int64_t r = t * blocks.N; r < (t + 1) * blocks.N; ++r) kept += at(r) >= 0;
            share_.template as<F>()[t] = F(1) / F(kept ? kept : 1);
        }
    }

    // The target of row r, or -1.
    int64_t at(int64_t r) const {
        const int64_t v = target_[r];
        return v != ignored_ && v >= 0 && v < blocks_.D ? v : -1;
    }
    F share(int64_t t) const { return share_.template as<F>()[t]; }

    // out[t] = the mean over the kept rows of task t, added up in order.
    void mean(const F* rows, F* out) const {
        for (int64_t t = 0; t < blocks_.T; ++t) {
            double total = 0;
            for (int64_t r = t * blocks_.N; r < (t + 1) * blocks_.N; ++r) total += at(r) < 0 ? 0 : double(rows[r]);
            out[t] = F(total * double(share(t)));
        }
    }

private:
    const int64_t* target_;
    int64_t ignored_;
    const Blocks& blocks_;
    Scratch share_;
};

inline float log(float x) { return __builtin_logf(x); }
inline double log(double x) { return __builtin_log(x); }

// Loads logits from p + i, with minus infinity in the lanes past the end of the row.
template <class F, class... Lanes>
inline Vec<F> logits(const F* p, int64_t i, Lanes... n) {
    Vec<F> v = Vec<F>{} - F(__builtin_inf());
    std::memcpy(&v, p + i, (static_cast<std::size_t>(n) + ... + (sizeof...(n) ? 0 : kLanes<F>)) * sizeof(F));
    return v;
}

// The largest logit `top` of a row, and the logarithm of the sum of exp(z - top).
template <class F>
struct LogSumExp {
    F top, log_sum;
};
template <class F>
LogSumExp<F> log_sum_exp(const F* z, int64_t V) {
    Vec<F> highest = logits(z, 0, V < kLanes<F> ? V : kLanes<F>), total{};
    each<F>(V, [&](int64_t i, auto... n) {
        const Vec<F> v = logits(z, i, n...);
        highest = v > highest ? v : highest;
    });
    F top = highest[0];
    for (int64_t i = 1; i < kLanes<F>; ++i) top = highest[i] > top ? highest[i] : top;
    each<F>(V, [&](int64_t i, auto... n) { total += exp<F>(logits(z, i, n...) - top); });
    return {top, log(sum<F>(total))};
}

// Writes exp(z - l) and returns its sum.
template <class F>
F unscaled(const F* z, F lse, int64_t V, F* p) {
    Vec<F> total{};
    each<F>(V, [&](int64_t i, auto... n) {
        const Vec<F> v = exp<F>(logits(z, i, n...) - lse);
        total += v;
        store(p + i, v, n...);
    });
    return sum<F>(total);
}

template <class F>
void forward(const Args& args) {
    const F* z = args.tensor<F>(0);
    F *y = args.tensor<F>(2), *lse = args.tensor<F>(3);
    const Blocks blocks(args.sizes[0], args.sizes[1], args.sizes[2], args.threads);
    const int64_t V = blocks.D;
    const Targets<F> targets(args.tensors[1], args.scalars[0], blocks);
    const Scratch losses(blocks.T * blocks.N * static_cast<int64_t>(sizeof(F)));
    blocks.run([&](int64_t, int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t v = targets.at(r);
            lse[r] = losses.as<F>()[r] = 0;
            if (v < 0) continue;
            const auto [top, log_sum] = log_sum_exp(z + r * V, V);
            lse[r] = top + log_sum;
            losses.as<F>()[r] = top - z[r * V + v] + log_sum;
        }
    });
    targets.mean(losses.as<F>(), y);
}

template <class F>
void jvp(const Args& args) {
    const F *z = args.tensor<F>(0), *lse = args.tensor<F>(2), *t_z = args.tensor<F>(3);
    F *t_y = args.tensor<F>(4), *t_lse = args.tensor<F>(5);
    const Blocks blocks(args.sizes[0], args.sizes[1], args.sizes[2], args.threads);
    const int64_t V = blocks.D;
    const Targets<F> targets(args.tensors[1], args.scalars[0], blocks);
    const Scratch losses(blocks.T * blocks.N * static_cast<int64_t>(sizeof(F)));
    blocks.run([&](int64_t, int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const int64_t v = targets.at(r);
            t_lse[r] = losses.as<F>()[r] = 0;
            if (v < 0) continue;
            Vec<F> total{}, along{};
            each<F>(V, [&](int64_t i, auto... n) {
                const Vec<F> p = exp<F>(logits(z + r * V, i, n...) - lse[r]);
                total += p;
                along += p * load(t_z + r * V + i, n...);
            });
            t_lse[r] = sum<F>(along) / sum<F>(total);
            losses.as<F>()[r] = t_lse[r] - t_z[r * V + v];
        }
    });
    targets.mean(losses.as<F>(), t_y);
}

template <class F>
void vjp(const Args& args) {
    const F *z = args.tensor<F>(0), *lse = args.tensor<F>(2), *ct_y = args.tensor<F>(3);
    F* ct_z = args.tensor<F>(4);
    const Blocks blocks(args.sizes[0], args.sizes[1], args.sizes[2], args.threads);
    const int64_t V = blocks.D;
    const Targets<F> targets(args.tensors[1], args.scalars[0], blocks);
    blocks.run([&](int64_t t, int64_t, int64_t begin, int64_t end) {
        const F scale = targets.share(t) * ct_y[t];
        for (int64_t r = begin; r < end; ++r) {
            F* p = ct_z + r * V;
            const int64_t v = targets.at(r);
            if (v < 0) {
                std::memset(p, 0, static_cast<std::size_t>(V) * sizeof(F));
                continue;
            }
            const F share = scale / unscaled(z + r * V, lse[r], V, p);
            each<F>(V, [&](int64_t i, auto... n) { store(p + i, load(p + i, n...) * share, n...); });
            p[v] -= scale;
        }
    });
}

template <class F>
void vjp_jvp(const Args& args) {
    const F *z = args.tensor<F>(0), *lse = args.tensor<F>(2), *t_z = args.tensor<F>(3), *t_lse = args.tensor<F>(4);
    const F *ct_y = args.tensor<F>(5), *t_ct_y = args.tensor<F>(6);
    F* t_ct_z = args.tensor<F>(7);
    const Blocks blocks(args.sizes[0], args.sizes[1], args.sizes[2], args.threads);
    const int64_t V = blocks.D;
    const Targets<F> targets(args.tensors[1], args.scalars[0], blocks);
    blocks.run([&](int64_t t, int64_t, int64_t begin, int64_t end) {
        const F scale = targets.share(t) * ct_y[t], t_scale = t_ct_y ? targets.share(t) * t_ct_y[t] : F(0);
        for (int64_t r = begin; r < end; ++r) {
            F* p = t_ct_z + r * V;
            const int64_t v = targets.at(r);
            if (v < 0) {
                std::memset(p, 0, static_cast<std::size_t>(V) * sizeof(F));
                continue;
            }
            const F total = unscaled(z + r * V, lse[r], V, p), share = scale / total, t_share = t_scale / total;
            each<F>(V, [&](int64_t i, auto... n) {
                const Vec<F> t_log_p = load(t_z + r * V + i, n...) - t_lse[r];
                store(p + i, load(p + i, n...) * (share * t_log_p + t_share), n...);
            });
            p[v] -= t_scale;
        }
    });
}

}  // namespace

extern const Kernel cross_entropy_kernels[] = {
    {"cross_entropy_forward", "logits:TNV target:TNi -> y:T lse:TN", 1, {forward<float>, forward<double>}},
    {"cross_entropy_jvp",
     "logits:TNV target:TNi lse:TN t_logits:TNV -> t_y:T t_lse:TN",
     1,
     {jvp<float>, jvp<double>}},
    {"cross_entropy_vjp", "logits:TNV target:TNi lse:TN ct_y:T -> ct_logits:TNV", 1, {vjp<float>, vjp<double>}},
    {"cross_entropy_vjp_jvp",
     "logits:TNV target:TNi lse:TN t_logits:TNV t_lse:TN ct_y:T t_ct_y:T? -> t_ct_logits:TNV",
     1,
     {vjp_jvp<float>, vjp_jvp<double>}},
    {}};

}  // namespace metakern::METAKERN_ISA
