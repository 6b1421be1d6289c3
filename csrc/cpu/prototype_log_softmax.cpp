// The log-softmax of -|u - p|² for queries u and prototypes p, the means of the support examples of each class. With
// pi = exp(y), and n the number of examples of a class, whose y is minus infinity if n = 0:
//
//     t_z  = -2 (u - p) . (t_u - t_p)              t_y    = t_z - sum over c of pi t_z
//     ct_z = ct_y - pi (sum over c of ct_y)        t_ct_z = t_ct_y - pi (sum of t_ct_y + t_y (sum of ct_y))
//     ct_u = -2 (sum over c of ct_z (u - p))       ct_p   = 2 (sum over q of ct_z (u - p))     ct_x = ct_p / n
//
// and t_ct_u, t_ct_p are the tangents of the last two. A task is a unit of work. The prototypes stay in cache, and
// differences are taken before they are squared, so that embeddings far from zero lose no digits.
#include "rows.h"

#include <type_traits>

namespace metakern::METAKERN_ISA {
namespace {

inline float exp(float x) { return __builtin_expf(x); }
inline double exp(double x) { return __builtin_exp(x); }
inline float log(float x) { return __builtin_logf(x); }
inline double log(double x) { return __builtin_log(x); }

// The sizes of a call, and the classes of one task's support.
template <class F>
struct Task {
    int64_t S, D, Q, C;
    const int64_t* label;
    const F* shots;

    bool present(int64_t c) const { return shots[c] > 0; }
    // The class of support example i, or -1. A label out of range counts as padding, as it must never become an address.
    int64_t at(int64_t i) const { return label[i] >= 0 && label[i] < C && present(label[i]) ? label[i] : -1; }

    // p = the mean of x over each class's examples, [C, D].
    void means(const F* x, F* p) const {
        std::memset(p, 0, static_cast<std::size_t>(C * D) * sizeof(F));
        for (int64_t i = 0; i < S; ++i)
            if (const int64_t c = at(i); c >= 0)
                each<F>(D, [&](int64_t d, auto... n) { add(p + c * D + d, load(x + i * D + d, n...), n...); });
        for (int64_t c = 0; c < C; ++c)
            if (present(c))
                each<F>(D, [&, row = p + c * D](int64_t d, auto... n) { store(row + d, load(row + d, n...) / shots[c], n...); });
    }

    // The transpose of `means`: ct_x of each example from ct_p of its class.
    void spread(const F* ct_p, F* ct_x) const {
        for (int64_t i = 0; i < S; ++i) {
            const int64_t c = at(i);
            each<F>(D, [&](int64_t d, auto... n) {
                store(ct_x + i * D + d, c < 0 ? Vec<F>{} : load(ct_p + c * D + d, n...) / shots[c], n...);
            });
        }
    }

    // The sum of a row [C] over the classes that have examples; 0 for a null row.
    F total(const F* row) const {
        F sum = 0;
        for (int64_t c = 0; row && c < C; ++c) sum += present(c) ? row[c] : F(0);
        return sum;
    }
};

// body(t, task) for each task of a call whose labels and shots are the tensors 2 and 3.
template <class F, class Body>
void each_task(const Args& args, Body body) {
    const int64_t T = args.sizes[0], S = args.sizes[1], D = args.sizes[2], Q = args.sizes[3], C = args.sizes[4];
    const int64_t* labels = args.tensor<int64_t>(2);
    const F* shots = args.tensor<F>(3);
    parallel_for(T, T * (S + Q * C) * D < kUnit ? 1 : args.threads, [&](int64_t t) {
        body(t, Task<F>{S, D, Q, C, labels + t * S, shots + t * C});
    });
}

// body(K, c) for the classes from c to c + K - 1: four at a time, for which a query is loaded once, and whose sums do not
// wait for each other.
template <class Body>
void each_class(int64_t C, Body body) {
    int64_t c = 0;
    for (; c + 4 <= C; c += 4) body(std::integral_constant<int, 4>{}, c);
    for (; c < C; ++c) body(std::integral_constant<int, 1>{}, c);
}

template <class F>
void forward(const Args& args) {
    const F *x = args.tensor<F>(0), *u = args.tensor<F>(1);
    F *y = args.tensor<F>(4), *p = args.tensor<F>(5);
    each_task<F>(args, [&](int64_t t, const Task<F>& task) {
        const int64_t D = task.D, C = task.C;
        F* means = p + t * C * D;
        task.means(x + t * task.S * D, means);
        for (int64_t q = t * task.Q; q < (t + 1) * task.Q; ++q) {
            F *row = y + q * C, top = -F(__builtin_inf()), sum_of_exp = 0;
            each_class(C, [&](auto K, int64_t c) {
                Vec<F> squares[K] = {};
                each<F>(D, [&](int64_t d, auto... n) {
                    const Vec<F> of_u = load(u + q * D + d, n...);
                    for (int k = 0; k < K; ++k) {
                        const Vec<F> apart = of_u - load(means + (c + k) * D + d, n...);
                        squares[k] += apart * apart;
                    }
                });
                for (int k = 0; k < K; ++k) row[c + k] = -sum<F>(squares[k]);
            });
            for (int64_t c = 0; c < C; ++c) {
                if (!task.present(c)) row[c] = -F(__builtin_inf());
                top = row[c] > top ? row[c] : top;
            }
            for (int64_t c = 0; c < C; ++c) sum_of_exp += task.present(c) ? exp(row[c] - top) : F(0);
            const F log_sum = log(sum_of_exp);
            for (int64_t c = 0; c < C; ++c)
                if (task.present(c)) row[c] = row[c] - top - log_sum;
        }
    });
}

template <class F>
void jvp(const Args& args) {
    const F *u = args.tensor<F>(1), *p = args.tensor<F>(4), *y = args.tensor<F>(5);
    const F *t_x = args.tensor<F>(6), *t_u = args.tensor<F>(7);
    F *t_y = args.tensor<F>(8), *t_p = args.tensor<F>(9);
    each_task<F>(args, [&](int64_t t, const Task<F>& task) {
        const int64_t D = task.D, C = task.C;
        const F* means = p + t * C * D;
        F* t_means = t_p + t * C * D;
        task.means(t_x + t * task.S * D, t_means);
        for (int64_t q = t * task.Q; q < (t + 1) * task.Q; ++q) {
            F *row = t_y + q * C, expected = 0;
            each_class(C, [&](auto K, int64_t c) {
                Vec<F> products[K] = {};
                each<F>(D, [&](int64_t d, auto... n) {
                    const Vec<F> of_u = load(u + q * D + d, n...), of_t_u = load(t_u + q * D + d, n...);
                    for (int k = 0; k < K; ++k)
                        products[k] += (of_u - load(means + (c + k) * D + d, n...)) *
                                       (of_t_u - load(t_means + (c + k) * D + d, n...));
                });
                for (int k = 0; k < K; ++k) row[c + k] = F(-2) * sum<F>(products[k]);
            });
            for (int64_t c = 0; c < C; ++c) {
                if (!task.present(c)) row[c] = 0;
                expected += exp(y[q * C + c]) * row[c];
            }
            for (int64_t c = 0; c < C; ++c)
                if (task.present(c)) row[c] -= expected;
        }
    });
}

// Writes the cotangents of support and query, or their tangents: the sums of a (u - p) + b (t_u - t_p) over the classes
// and, negated, over the queries. row(q, a, b) writes the weights [C] of query q; b is not read if t_u is null.
template <class F, class Row>
void pull(const Task<F>& task, const F* u, const F* p, const F* t_u, const F* t_p, F* ct_x, F* ct_u, Row row) {
    const int64_t D = task.D, C = task.C;
    const Scratch memory((C * D + 2 * C) * static_cast<int64_t>(sizeof(F)));
    F *ct_p = memory.as<F>(), *a = ct_p + C * D, *b = a + C;
    std::memset(ct_p, 0, static_cast<std::size_t>(C * D) * sizeof(F));
    std::memset(ct_u, 0, static_cast<std::size_t>(task.Q * D) * sizeof(F));
    for (int64_t q = 0; q < task.Q; ++q) {
        row(q, a, b);
        for (int64_t c = 0; c < C; ++c)
            if (!task.present(c)) a[c] = b[c] = 0;
        each_class(C, [&](auto K, int64_t c) {
            each<F>(D, [&](int64_t d, auto... n) {
                const Vec<F> of_u = load(u + q * D + d, n...);
                Vec<F> total{};
                for (int k = 0; k < K; ++k) {
                    const int64_t i = (c + k) * D + d;
                    Vec<F> v = a[c + k] * (of_u - load(p + i, n...));
                    if (t_u) v += b[c + k] * (load(t_u + q * D + d, n...) - load(t_p + i, n...));
                    total += v;
                    add(ct_p + i, -v, n...);
                }
                add(ct_u + q * D + d, total, n...);
            });
        });
    }
    task.spread(ct_p, ct_x);
}

template <class F>
void vjp(const Args& args) {
    const F *u = args.tensor<F>(1), *p = args.tensor<F>(4), *y = args.tensor<F>(5), *ct_y = args.tensor<F>(6);
    F *ct_x = args.tensor<F>(7), *ct_u = args.tensor<F>(8);
    each_task<F>(args, [&](int64_t t, const Task<F>& task) {
        const int64_t D = task.D, C = task.C, first = t * task.Q;
        const auto row = [&](int64_t q, F* a, F*) {
            const F *of_y = y + (first + q) * C, *of_ct = ct_y + (first + q) * C, total = task.total(of_ct);
            for (int64_t c = 0; c < C; ++c) a[c] = F(-2) * (of_ct[c] - exp(of_y[c]) * total);
        };
        pull<F>(task, u + first * D, p + t * C * D, nullptr, nullptr, ct_x + t * task.S * D, ct_u + first * D, row);
    });
}

template <class F>
void vjp_jvp(const Args& args) {
    const F *u = args.tensor<F>(1), *p = args.tensor<F>(4), *y = args.tensor<F>(5), *t_u = args.tensor<F>(7);
    const F *t_p = args.tensor<F>(8), *t_y = args.tensor<F>(9), *ct_y = args.tensor<F>(10), *t_ct_y = args.tensor<F>(11);
    F *t_ct_x = args.tensor<F>(12), *t_ct_u = args.tensor<F>(13);
    each_task<F>(args, [&](int64_t t, const Task<F>& task) {
        const int64_t D = task.D, C = task.C, first = t * task.Q;
        const auto row = [&](int64_t q, F* a, F* b) {
            const int64_t start = (first + q) * C;
            const F total = task.total(ct_y + start), t_total = task.total(t_ct_y ? t_ct_y + start : nullptr);
            for (int64_t c = 0, i = start; c < C; ++c, ++i) {
                const F pi = exp(y[i]), t_ct = t_ct_y ? t_ct_y[i] : F(0);
                a[c] = F(-2) * (t_ct - pi * (t_total + t_y[i] * total));
                b[c] = F(-2) * (ct_y[i] - pi * total);
            }
        };
        pull<F>(task, u + first * D, p + t * C * D, t_u + first * D, t_p + t * C * D, t_ct_x + t * task.S * D,
                t_ct_u + first * D, row);
    });
}

}  // namespace

// The first tensors of every rule: the embeddings, and the classes of the support.
#define METAKERN_EMBEDDED "support:TSD query:TQD labels:TSi shots:TC "

extern const Kernel prototype_log_softmax_kernels[] = {
    {"prototype_log_softmax_forward", METAKERN_EMBEDDED "-> y:TQC p:TCD", 0, {forward<float>, forward<double>}},
    {"prototype_log_softmax_jvp",
     METAKERN_EMBEDDED "p:TCD y:TQC t_support:TSD t_query:TQD -> t_y:TQC t_p:TCD",
     0,
     {jvp<float>, jvp<double>}},
    {"prototype_log_softmax_vjp",
     METAKERN_EMBEDDED "p:TCD y:TQC ct_y:TQC -> ct_support:TSD ct_query:TQD",
     0,
     {vjp<float>, vjp<double>}},
    {"prototype_log_softmax_vjp_jvp",
     METAKERN_EMBEDDED "p:TCD y:TQC t_support:TSD t_query:TQD t_p:TCD t_y:TQC ct_y:TQC t_ct_y:TQC? "
                       "-> t_ct_support:TSD t_ct_query:TQD",
     0,
     {vjp_jvp<float>, vjp_jvp<double>}},
    {}};

#undef METAKERN_EMBEDDED

}  // namespace metakern::METAKERN_ISA
