// The four rules of recurrent cells over whole sequences: the part that depends on the step before. The large products
// are in metakern/ops/core/recurrent.py.
//
// A step is a small matrix product with W_hh, which is packed once for all steps, and a loop over the hidden units with
// the formulas of cells.h. The left operand of the product is the state h forward in time, and ct_a backward. A step
// beyond the length of its sequence leaves the states as they are and writes zeros.
#pragma once

#include "../kernel.h"
#include "../parallel.h"
#include "matrix.h"
#include "rows.h"

namespace metakern::METAKERN_ISA {

inline Vec<float> sigmoid(Vec<float> x) { return 1.0f / (1.0f + exp<float>(-x)); }
inline Vec<double> sigmoid(Vec<double> x) { return 1.0 / (1.0 + exp<double>(-x)); }
inline Vec<float> tanh(Vec<float> x) { return tanh_of<float>(x); }
inline Vec<double> tanh(Vec<double> x) { return tanh_of<double>(x); }
inline Vec<float> positive(Vec<float> x) { return x > 0 ? splat(1.0f) : Vec<float>{}; }
inline Vec<double> positive(Vec<double> x) { return x > 0 ? splat(1.0) : Vec<double>{}; }
#include "../cells.h"

// Fewer multiplications than this are not worth waking a thread.
constexpr int64_t kStep = 1 << 13;

// The memory of one sequence between two steps: the left operand of the product, its result, and `states`. Those are
// the states other than h (forward), or the parts of the states' cotangents that do not pass through the product
// (backward).
template <class F>
struct Sequence {
    F *left, *product, *states;
};

// The sequences of a call: T tasks of B sequences of L steps with H hidden units.
template <class F>
struct Sequences {
    int64_t T, B, L, H;
    const int64_t* lengths;  // [T, B], or null: all L
    bool reverse;
    int threads;
    Products<F> products;

    bool active(int64_t row, int64_t l) const { return !lengths || l < lengths[row]; }

    // Runs a rule over time, for blocks of sequences of one task, with the weights w [T, G, H]. In each step a product
    // turns `from` numbers of each sequence into `to` numbers. The rule has rule.begin(row, sequence), rule.step(row,
    // l, sequence) and rule.end(row, sequence).
    template <class Rule>
    void run(const F* w, int64_t G, const Rule& rule) const {
        const int64_t from = Rule::kBack ? G : H, to = Rule::kBack ? H : G, weight = G * H;
        const int64_t packed_size = panels<F>(to) * kPanel<F> * from, carry = 2 * H;
        // Padded, as rows of a power of two would compete for the same few sets of the L1 cache.
        const int64_t left_row = from + kLanes<F>, product_row = to + kLanes<F>;
        // One unit for each task. If there are fewer tasks than threads, a task's sequences are split into parts.
        const int wanted = T * L * B * weight < kStep ? 1 : threads;
        const int64_t parts = T && B && T < wanted ? min((wanted + T - 1) / T, B) : 1;
        const bool together = parts > 1;
        const auto matrix = [=](int64_t t) {
            return Rule::kBack ? Matrix<F>{w + t * weight, H, 1} : Matrix<F>{w + t * weight, 1, H};
        };
        const Scratch shared(together ? T * packed_size * static_cast<int64_t>(sizeof(F)) : 0);
        if (together)
            parallel_for(T * panels<F>(to), wanted, [&](int64_t unit) {
                const int64_t t = unit / panels<F>(to), p = unit % panels<F>(to);
                products.pack(shared.as<F>() + t * packed_size + p * kPanel<F> * from, matrix(t), from, to, p, p + 1);
            });
        parallel_for(T * parts, wanted, [&](int64_t unit) {
            const int64_t t = unit / parts, part = unit % parts;
            const int64_t first = t * B + B * part / parts, rows = t * B + B * (part + 1) / parts - first;
            F* memory = static_cast<F*>(thread_memory(
                ((together ? 0 : packed_size) + rows * (left_row + product_row + carry)) * static_cast<int64_t>(sizeof(F))));
            F* packed = together ? shared.as<F>() + t * packed_size : memory;
            if (!together) products.pack(packed, matrix(t), from, to, 0, panels<F>(to)), memory += packed_size;
            F *left = memory, *product = left + rows * left_row, *carried = product + rows * product_row;
            const auto sequence = [=](int64_t i) {
                return Sequence<F>{left + i * left_row, product + i * product_row, carried + i * carry};
            };
            const auto multiply_all = [=] {
                products.multiply(rows, to, from, {left, left_row, 1}, packed, {product, product_row, nullptr, 0});
            };
            for (int64_t i = 0; i < rows; ++i) rule.begin(first + i, sequence(i));
            for (int64_t step = 0; step < L; ++step) {
                const int64_t l = reverse != Rule::kBack ? L - 1 - step : step;
                if (step || !Rule::kBack) multiply_all();
                for (int64_t i = 0; i < rows; ++i) rule.step(first + i, l, sequence(i));
            }
            if (Rule::kBack && L) multiply_all();
            for (int64_t i = 0; i < rows; ++i) rule.end(first + i, sequence(i));
        });
    }

    template <class S>
    static S min(S a, S b) {
        return a < b ? a : b;
    }
};

// The rules of a cell. Tensors are in the order of the signatures in <cell>.cpp; h is state 0, c state 1.
template <class F, template <class> class CellOf>
struct Recurrent {
    using Cell = CellOf<F>;
    using V = Vec<F>;
    static constexpr int G = Cell::kGates, K = Cell::kKept, S = Cell::kStates;
    static constexpr bool keeps_gates = K > 1, reads_h = Cell::kSplit;

    // A tensor [T, B, L, n H], read or written a vector of hidden units at a time. An absent one reads as zero.
    template <int n, class P>
    struct Steps {
        P* data;
        int64_t H;

        template <class... Lanes>
        void load(int64_t at, int64_t j, V* to, Lanes... lanes) const {
            for (int g = 0; g < n; ++g) to[g] = maybe(data, (at * n + g) * H + j, lanes...);
        }
        template <class... Lanes>
        void store(int64_t at, int64_t j, const V* from, Lanes... lanes) const {
            for (int g = 0; g < n; ++g) METAKERN_ISA::store(data + (at * n + g) * H + j, from[g], lanes...);
        }
        void clear(int64_t at) const {
            if (data) std::memset(data + at * n * H, 0, static_cast<std::size_t>(n * H) * sizeof(F));
        }
    };
    template <int n>
    using In = Steps<n, const F>;
    template <int n>
    using Out = Steps<n, F>;

    // A tensor for each state, [T, B, L, H], or [T, B, H] for the first and last ones. One that is absent, or that the
    // cell's formulas do not read, reads as zero.
    template <class P>
    struct States {
        P* data[S];
        int64_t H;

        template <class... Lanes>
        void load(int64_t at, int64_t j, V* to, Lanes... lanes) const {
            for (int s = 0; s < S; ++s) to[s] = maybe(data[s], at * H + j, lanes...);
        }
        template <class... Lanes>
        void store(int64_t at, int64_t j, const V* from, Lanes... lanes) const {
            for (int s = 0; s < S; ++s) METAKERN_ISA::store(data[s] + at * H + j, from[s], lanes...);
        }
        void clear(int64_t at) const {
            for (int s = 0; s < S; ++s) std::memset(data[s] + at * H, 0, static_cast<std::size_t>(H) * sizeof(F));
        }
    };

    static void copy(F* to, const F* from, int64_t count) {
        const auto bytes = static_cast<std::size_t>(count) * sizeof(F);
        if (from)
            std::memcpy(to, from, bytes);
        else
            std::memset(to, 0, bytes);
    }

    template <class P>
    static States<P> states(Tensors<F>& tensors, int64_t H, bool all = true) {
        States<P> found{{}, H};
        for (int s = 0; s < S; ++s) found.data[s] = tensors.next(all || s || reads_h);
        return found;
    }

    static Sequences<F> sequences(const Args& args, const F* lengths, int64_t H) {
        return {args.sizes[0], args.sizes[1], args.sizes[2], H, reinterpret_cast<const int64_t*>(lengths),
                args.scalars[0] != 0, args.threads, {args.bfloat16}};
    }

    struct Forward {
        static constexpr bool kBack = false;
        const Sequences<F>* q;
        In<G> u;
        const F* b_hh;
        States<const F> first;
        Out<1> y;
        States<F> last;
        Out<K> kept;
        States<F> before;

        void begin(int64_t row, Sequence<F> s) const {
            copy(s.left, first.data[0] ? first.data[0] + row * q->H : nullptr, q->H);
            if (S > 1) copy(s.states, first.data[S - 1] ? first.data[S - 1] + row * q->H : nullptr, q->H);
        }
        void step(int64_t row, int64_t l, Sequence<F> s) const {
            const int64_t at = row * q->L + l, H = q->H;
            if (!q->active(row, l)) return y.clear(at), kept.clear(at), before.clear(at);
            const F* bias = b_hh ? b_hh + row / q->B * G * H : nullptr;
            each<F>(H, [&](int64_t j, auto... n) {
                V inputs[G], p[G], state[S], gates[K];
                u.load(at, j, inputs, n...);
                for (int g = 0; g < G; ++g) p[g] = load(s.product + g * H + j, n...) + maybe(bias, g * H + j, n...);
                state[0] = load(s.left + j, n...);
                if (S > 1) state[S - 1] = load(s.states + j, n...);
                before.store(at, j, state, n...);
                Cell::forward(inputs, p, state, gates);
                if (keeps_gates) kept.store(at, j, gates, n...);
                y.store(at, j, state, n...);
                METAKERN_ISA::store(s.left + j, state[0], n...);
                if (S > 1) METAKERN_ISA::store(s.states + j, state[S - 1], n...);
            });
        }
        void end(int64_t row, Sequence<F> s) const {
            copy(last.data[0] + row * q->H, s.left, q->H);
            if (S > 1) copy(last.data[S - 1] + row * q->H, s.states, q->H);
        }
    };

    static void forward(const Args& args) {
        Tensors<F> tensors(args);
        const int64_t H = args.sizes[3];
        const In<G> u{tensors.next(), H};
        const F *w = tensors.next(), *b_hh = tensors.next(Cell::kSplit);
        const auto first = states<const F>(tensors, H);
        const auto q = sequences(args, tensors.next(), H);
        const Out<1> y{tensors.next(), H};
        const auto last = states<F>(tensors, H);
        const Out<K> kept{tensors.next(keeps_gates), H};
        q.run(w, G * H, Forward{&q, u, b_hh, first, y, last, kept, states<F>(tensors, H)});
    }

    struct Jvp {
        static constexpr bool kBack = false;
        const Sequences<F>* q;
        In<G> t_u, t_p;
        In<K> kept;
        States<const F> before, t_first;
        Out<1> t_y;
        States<F> t_last;
        Out<K> t_kept;
        States<F> t_before;

        void begin(int64_t row, Sequence<F> s) const {
            copy(s.left, t_first.data[0] ? t_first.data[0] + row * q->H : nullptr, q->H);
            if (S > 1) copy(s.states, t_first.data[S - 1] ? t_first.data[S - 1] + row * q->H : nullptr, q->H);
        }
        void step(int64_t row, int64_t l, Sequence<F> s) const {
            const int64_t at = row * q->L + l, H = q->H;
            if (!q->active(row, l)) return t_y.clear(at), t_kept.clear(at), t_before.clear(at);
            each<F>(H, [&](int64_t j, auto... n) {
                V u[G], p[G], gates[K], state[S], t_state[S], t_gates[K];
                t_u.load(at, j, u, n...);
                t_p.load(at, j, p, n...);
                for (int g = 0; g < G; ++g) p[g] += load(s.product + g * H + j, n...);
                kept.load(at, j, gates, n...);
                before.load(at, j, state, n...);
                t_state[0] = load(s.left + j, n...);
                if (S > 1) t_state[S - 1] = load(s.states + j, n...);
                t_before.store(at, j, t_state, n...);
                Cell::jvp(gates, state, u, p, t_state, t_gates);
                if (keeps_gates) t_kept.store(at, j, t_gates, n...);
                t_y.store(at, j, t_state, n...);
                METAKERN_ISA::store(s.left + j, t_state[0], n...);
                if (S > 1) METAKERN_ISA::store(s.states + j, t_state[S - 1], n...);
            });
        }
        void end(int64_t row, Sequence<F> s) const {
            copy(t_last.data[0] + row * q->H, s.left, q->H);
            if (S > 1) copy(t_last.data[S - 1] + row * q->H, s.states, q->H);
        }
    };

    static void jvp(const Args& args) {
        Tensors<F> tensors(args);
        const int64_t H = args.sizes[3];
        const In<G> t_u{tensors.next(), H};
        const F* w = tensors.next();
        const In<G> t_p{tensors.next(Cell::kSplit), H};
        const In<K> kept{tensors.next(), H};
        const auto before = states<const F>(tensors, H, false), t_first = states<const F>(tensors, H);
        const auto q = sequences(args, tensors.next(), H);
        const Out<1> t_y{tensors.next(), H};
        const auto t_last = states<F>(tensors, H);
        const Out<K> t_kept{tensors.next(keeps_gates), H};
        q.run(w, G * H, Jvp{&q, t_u, t_p, kept, before, t_first, t_y, t_last, t_kept, states<F>(tensors, H)});
    }

    // What vjp and vjp_jvp share. Rule::pull turns the cotangents of the states after a step into those of the states
    // before.
    template <class Rule>
    struct Back {
        static constexpr bool kBack = true;
        const Sequences<F>* q;
        In<1> ct_y;
        States<const F> ct_last;
        Out<G> ct_a, ct_u;
        States<F> ct_first;
        Rule rule;

        void begin(int64_t row, Sequence<F> s) const {
            std::memset(s.product, 0, static_cast<std::size_t>(q->H) * sizeof(F));
            for (int i = 0; i < S; ++i)
                copy(s.states + i * q->H, ct_last.data[i] ? ct_last.data[i] + row * q->H : nullptr, q->H);
        }
        void step(int64_t row, int64_t l, Sequence<F> s) const {
            const int64_t at = row * q->L + l, H = q->H;
            if (!q->active(row, l)) {
                ct_a.clear(at), ct_u.clear(at), rule.clear(at);
                std::memset(s.left, 0, static_cast<std::size_t>(G * H) * sizeof(F));
                return each<F>(H, [&](int64_t j, auto... n) { add(s.states + j, load(s.product + j, n...), n...); });
            }
            each<F>(H, [&](int64_t j, auto... n) {
                V ct[S], a[G], u[G];
                ct_y.load(at, j, ct, n...);
                ct[0] += load(s.product + j, n...) + load(s.states + j, n...);
                if (S > 1) ct[S - 1] = load(s.states + H + j, n...);
                rule.pull(at, j, ct, a, u, n...);
                for (int g = 0; g < G; ++g) METAKERN_ISA::store(s.left + g * H + j, a[g], n...);
                for (int i = 0; i < S; ++i) METAKERN_ISA::store(s.states + i * H + j, ct[i], n...);
                ct_a.store(at, j, a, n...);
                if (Cell::kSplit) ct_u.store(at, j, u, n...);
            });
        }
        void end(int64_t row, Sequence<F> s) const {
            each<F>(q->H, [&](int64_t j, auto... n) { add(s.states + j, load(s.product + j, n...), n...); });
            for (int i = 0; i < S; ++i) copy(ct_first.data[i] + row * q->H, s.states + i * q->H, q->H);
        }
    };

    struct Vjp {
        In<K> kept;
        States<const F> before;
        States<F> cts;  // the total cotangents of the states after each step

        template <class... Lanes>
        void pull(int64_t at, int64_t j, V* ct, V* ct_a, V* ct_u, Lanes... n) const {
            V gates[K], state[S], total[S];
            kept.load(at, j, gates, n...);
            before.load(at, j, state, n...);
            Cell::total(gates, state, ct);
            cts.store(at, j, ct, n...);
            for (int i = 0; i < S; ++i) total[i] = ct[i];
            Cell::vjp(gates, state, total, ct_a, ct_u, ct);
        }
        void clear(int64_t at) const { cts.clear(at); }
    };

    static void vjp(const Args& args) {
        Tensors<F> tensors(args);
        const int64_t H = args.sizes[3];
        const In<1> ct_y{tensors.next(), H};
        const F* w = tensors.next();
        const In<K> kept{tensors.next(), H};
        const auto before = states<const F>(tensors, H, false), ct_last = states<const F>(tensors, H);
        const auto q = sequences(args, tensors.next(), H);
        const Out<G> ct_a{tensors.next(), H}, ct_u{tensors.next(Cell::kSplit), H};
        const auto ct_first = states<F>(tensors, H), cts = states<F>(tensors, H);
        q.run(w, G * H, Back<Vjp>{&q, ct_y, ct_last, ct_a, ct_u, ct_first, {kept, before, cts}});
    }

    // ct_a and ct_u of all steps, from the total cotangents.
    static void cotangents(const Args& args) {
        Tensors<F> tensors(args);
        const int64_t tokens = args.sizes[0] * args.sizes[1] * args.sizes[2], H = args.sizes[3];
        const auto cts = states<const F>(tensors, H);
        const In<K> kept{tensors.next(), H};
        const auto before = states<const F>(tensors, H, false);
        const Out<G> ct_a{tensors.next(), H}, ct_u{tensors.next(Cell::kSplit), H};
        const int64_t block = kUnit / (H * G + 1) + 1, units = (tokens + block - 1) / block;
        parallel_for(units, tokens * H < kUnit ? 1 : args.threads, [&](int64_t unit) {
            for (int64_t at = unit * block; at < (unit + 1) * block && at < tokens; ++at)
                each<F>(H, [&](int64_t j, auto... n) {
                    V gates[K], state[S], ct[S], a[G], u[G], back[S];
                    cts.load(at, j, ct, n...);
                    kept.load(at, j, gates, n...);
                    before.load(at, j, state, n...);
                    Cell::vjp(gates, state, ct, a, u, back);
                    ct_a.store(at, j, a, n...);
                    if (Cell::kSplit) ct_u.store(at, j, u, n...);
                });
        });
    }

    struct VjpJvp {
        In<K> kept, t_kept;
        States<const F> before, t_before, cts;
        In<1> source;  // ct_a t_W_hh, to be added to the tangent of the cotangent of h before each step

        template <class... Lanes>
        void pull(int64_t at, int64_t j, V* t_ct, V* t_ct_a, V* t_ct_u, Lanes... n) const {
            V gates[K], t_gates[K], state[S], t_state[S], ct[S], t_total[S], extra[1];
            kept.load(at, j, gates, n...);
            t_kept.load(at, j, t_gates, n...);
            before.load(at, j, state, n...);
            t_before.load(at, j, t_state, n...);
            cts.load(at, j, ct, n...);
            source.load(at, j, extra, n...);
            for (int i = 0; i < S; ++i) t_total[i] = t_ct[i];
            Cell::vjp_jvp(gates, state, t_gates, t_state, ct, t_total, t_ct_a, t_ct_u, t_ct);
            t_ct[0] += extra[0];
        }
        void clear(int64_t) const {}
    };

    static void vjp_jvp(const Args& args) {
        Tensors<F> tensors(args);
        const int64_t H = args.sizes[3];
        const auto cts = states<const F>(tensors, H);
        const F* w = tensors.next();
        const In<K> kept{tensors.next(), H};
        const auto before = states<const F>(tensors, H, false);
        const In<K> t_kept{tensors.next(), H};
        const auto t_before = states<const F>(tensors, H, false);
        const In<1> source{tensors.next(), H}, t_ct_y{tensors.next(), H};
        const auto t_ct_last = states<const F>(tensors, H);
        const auto q = sequences(args, tensors.next(), H);
        const Out<G> t_ct_a{tensors.next(), H}, t_ct_u{tensors.next(Cell::kSplit), H};
        const auto t_ct_first = states<F>(tensors, H);
        const VjpJvp rule{kept, t_kept, before, t_before, cts, source};
        q.run(w, G * H, Back<VjpJvp>{&q, t_ct_y, t_ct_last, t_ct_a, t_ct_u, t_ct_first, rule});
    }
};

}  // namespace metakern::METAKERN_ISA
