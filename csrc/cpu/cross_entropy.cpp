// Cross-entropy, the mean over a task's kept tokens. With l the log-sum-exp of a row of logits z, p = exp(z - l), e the
// one-hot target, and s = 1 / (kept tokens of the task) where a token is kept, 0 where it is ignored:
//
//     y = sum of s (l - z[target])             t_l    = p . t_z,   t_y = sum of s (t_l - t_z[target])
//     ct_z = s ct_y (p - e)                    t_ct_z = s ct_y p (t_z - t_l) + s t_ct_y (p - e)
//
// Nothing of the size of the logits is written but a cotangent of them.
#include "rows.h"

namespace metakern::METAKERN_ISA {
namespace {

// The targets of all tasks, and what each of a task's kept tokens counts. A target out of range is an ignored one: it
// must never become an address.
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

    // out[t] = the mean of a task's rows, added up in order.
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

// A row of V elements, past whose end is minus infinity.
template <class F, class... Lanes>
inline Vec<F> logits(const F* p, int64_t i, Lanes... n) {
    Vec<F> v = Vec<F>{} - F(__builtin_inf());
    std::memcpy(&v, p + i, (static_cast<std::size_t>(n) + ... + (sizeof...(n) ? 0 : kLanes<F>)) * sizeof(F));
    return v;
}

template <class F>
F log_sum_exp(const F* z, int64_t V) {
    Vec<F> highest = logits(z, 0, V < kLanes<F> ? V : kLanes<F>), total{};
    each<F>(V, [&](int64_t i, auto... n) {
        const Vec<F> v = logits(z, i, n...);
        highest = v > highest ? v : highest;
    });
    F top = highest[0];
    for (int64_t i = 1; i < kLanes<F>; ++i) top = highest[i] > top ? highest[i] : top;
    each<F>(V, [&](int64_t i, auto... n) { total += exp<F>(logits(z, i, n...) - top); });
    return top + log(sum<F>(total));
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
            lse[r] = log_sum_exp(z + r * V, V);
            losses.as<F>()[r] = v < 0 ? F(0) : lse[r] - z[r * V + v];
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
            Vec<F> total{};
            each<F>(V, [&](int64_t i, auto... n) {
                total += exp<F>(logits(z + r * V, i, n...) - lse[r]) * load(t_z + r * V + i, n...);
            });
            t_lse[r] = sum<F>(total);
            losses.as<F>()[r] = v < 0 ? F(0) : t_lse[r] - t_z[r * V + v];
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
            const int64_t v = targets.at(r);
            const F kept = v < 0 ? F(0) : scale;
            each<F>(V, [&](int64_t i, auto... n) {
                store(ct_z + r * V + i, exp<F>(logits(z + r * V, i, n...) - lse[r]) * kept, n...);
            });
            if (v >= 0) ct_z[r * V + v] -= kept;
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
            const int64_t v = targets.at(r);
            const F kept = v < 0 ? F(0) : scale, t_kept = v < 0 ? F(0) : t_scale;
            each<F>(V, [&](int64_t i, auto... n) {
                const Vec<F> p = exp<F>(logits(z + r * V, i, n...) - lse[r]);
                store(t_ct_z + r * V + i, p * (kept * (load(t_z + r * V + i, n...) - t_lse[r]) + t_kept), n...);
            });
            if (v >= 0) t_ct_z[r * V + v] -= t_kept;
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
