// The rules of a recurrent cell on a GPU: what each reads, keeps and writes at a step, and the calls of its kernels.
// The same rules stand in csrc/cpu/recurrent.h for CPUs; the formulas of a step are csrc/cells.h for both.
#pragma once

#include "launch.cuh"

namespace metakern::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float tanh(float x) { return tanhf(x); }
__device__ __forceinline__ float positive(float x) { return x > 0.0f ? 1.0f : 0.0f; }
#include "../../cells.h"

// The rules of a cell. Tensors are in the order of the signatures in csrc/cpu/<cell>.cpp; h is state 0, c state 1.
template <class E_, template <class> class CellOf>
struct Recurrent {
    using Cell = CellOf<float>;
    using E = E_;
    static constexpr int G = Cell::kGates, K = Cell::kKept, S = Cell::kStates;
    static constexpr bool keeps_gates = K > 1, reads_h = Cell::kSplit;

    // Tensors [T, B, L, n H], a unit at a time; an absent one reads as zero and is not written.
    template <int n, class P>
    struct Steps {
        P* data;
        std::int64_t H;

        __device__ void load(std::int64_t at, std::int64_t j, float* to) const {
            for (int g = 0; g < n; ++g) to[g] = data ? wide(data[(at * n + g) * H + j]) : 0.0f;
        }
        __device__ void store(std::int64_t at, std::int64_t j, const float* from) const {
            if (!data) return;
            for (int g = 0; g < n; ++g) data[(at * n + g) * H + j] = narrow<E>(from[g]);
        }
        __device__ void clear(std::int64_t at, std::int64_t j) const {
            const float zeros[n] = {};
            store(at, j, zeros);
        }
        __device__ void fetch(std::int64_t at, std::int64_t j) const {
            if (!data) return;
            for (int g = 0; g < n; ++g) prefetch(data + (at * n + g) * H + j);
        }
    };
    template <int n>
    using In = Steps<n, const E>;
    template <int n>
    using Out = Steps<n, E>;

    // The states, [T, B, L, H] each, or [T, B, H]: those of `In` that the cell's formulas read.
    template <class P>
    struct States {
        Steps<1, P> state[S];

        __device__ void load(std::int64_t at, std::int64_t j, float* to) const {
            for (int s = 0; s < S; ++s) state[s].load(at, j, to + s);
        }
        __device__ void store(std::int64_t at, std::int64_t j, const float* from) const {
            for (int s = 0; s < S; ++s) state[s].store(at, j, from + s);
        }
        __device__ void clear(std::int64_t at, std::int64_t j) const {
            for (int s = 0; s < S; ++s) state[s].clear(at, j);
        }
        __device__ void fetch(std::int64_t at, std::int64_t j) const {
            for (int s = 0; s < S; ++s) state[s].fetch(at, j);
        }
    };

    template <class P>
    static States<P> states(Tensors<E>& tensors, std::int64_t H, bool all = true) {
        States<P> found{};
        for (int s = 0; s < S; ++s) found.state[s] = {tensors.next(all || s || reads_h), H};
        return found;
    }

    struct Forward {
        using Element = E;
        static constexpr bool kBack = false;
        static constexpr int kStates = S, kFrom = 1, kTo = G;
        In<G> u;
        const E* b_hh;
        std::int64_t B;
        States<const E> first;
        Out<1> y;
        States<E> last;
        Out<K> kept;
        States<E> before;

        __device__ void begin(std::int64_t row, std::int64_t j, float* s) const { first.load(row, j, s); }
        __device__ void prefetch(std::int64_t at, std::int64_t j) const { u.fetch(at, j); }
        __device__ void step(std::int64_t row, std::int64_t at, std::int64_t j, float* p, float* s, float* left) const {
            float inputs[G], gates[K], bias[G];
            u.load(at, j, inputs);
            In<G>{b_hh, u.H}.load(row / B, j, bias);
            for (int g = 0; g < G; ++g) p[g] += bias[g];
            before.store(at, j, s);
            Cell::forward(inputs, p, s, gates);
            if (keeps_gates) kept.store(at, j, gates);
            y.store(at, j, s);
            left[0] = s[0];
        }
        __device__ void skip(std::int64_t at, std::int64_t j, const float*, float* s, float* left) const {
            y.clear(at, j), kept.clear(at, j), before.clear(at, j);
            left[0] = s[0];
        }
        __device__ void end(std::int64_t row, std::int64_t j, const float* s) const { last.store(row, j, s); }
    };

    static Plan forward(const Call& call) {
        Tensors<E> tensors(call);
        const std::int64_t B = call.sizes.at(1), H = call.sizes.at(3);
        const In<G> u{tensors.next(), H};
        const E *w = tensors.next(), *b_hh = tensors.next(Cell::kSplit);
        const auto first = states<const E>(tensors, H);
        const void* lengths = tensors.next();
        const Out<1> y{tensors.next(), H};
        const auto last = states<E>(tensors, H);
        const Out<K> kept{tensors.next(keeps_gates), H};
        const auto before = states<E>(tensors, H);
        tensors.finish();
        return run(call, w, lengths, Forward{u, b_hh, B, first, y, last, kept, before});
    }

    struct Jvp {
        using Element = E;
        static constexpr bool kBack = false;
        static constexpr int kStates = S, kFrom = 1, kTo = G;
        In<G> t_u, t_p;
        In<K> kept;
        States<const E> before, t_first;
        Out<1> t_y;
        States<E> t_last;
        Out<K> t_kept;
        States<E> t_before;

        __device__ void begin(std::int64_t row, std::int64_t j, float* t_s) const { t_first.load(row, j, t_s); }
        __device__ void prefetch(std::int64_t at, std::int64_t j) const {
            t_u.fetch(at, j), t_p.fetch(at, j), kept.fetch(at, j), before.fetch(at, j);
        }
        __device__ void step(std::int64_t, std::int64_t at, std::int64_t j, float* p, float* t_s, float* left) const {
            float u[G], more[G], gates[K], s[S], t_gates[K];
            t_u.load(at, j, u);
            t_p.load(at, j, more);
            for (int g = 0; g < G; ++g) p[g] += more[g];
            kept.load(at, j, gates);
            before.load(at, j, s);
            t_before.store(at, j, t_s);
            Cell::jvp(gates, s, u, p, t_s, t_gates);
            if (keeps_gates) t_kept.store(at, j, t_gates);
            t_y.store(at, j, t_s);
            left[0] = t_s[0];
        }
        __device__ void skip(std::int64_t at, std::int64_t j, const float*, float* t_s, float* left) const {
            t_y.clear(at, j), t_kept.clear(at, j), t_before.clear(at, j);
            left[0] = t_s[0];
        }
        __device__ void end(std::int64_t row, std::int64_t j, const float* t_s) const { t_last.store(row, j, t_s); }
    };

    static Plan jvp(const Call& call) {
        Tensors<E> tensors(call);
        const std::int64_t H = call.sizes.at(3);
        const In<G> t_u{tensors.next(), H};
        const E* w = tensors.next();
        const In<G> t_p{tensors.next(Cell::kSplit), H};
        const In<K> kept{tensors.next(), H};
        const auto before = states<const E>(tensors, H, false), t_first = states<const E>(tensors, H);
        const void* lengths = tensors.next();
        const Out<1> t_y{tensors.next(), H};
        const auto t_last = states<E>(tensors, H);
        const Out<K> t_kept{tensors.next(keeps_gates), H};
        const auto t_before = states<E>(tensors, H);
        tensors.finish();
        return run(call, w, lengths, Jvp{t_u, t_p, kept, before, t_first, t_y, t_last, t_kept, t_before});
    }

    // What the two rules that go back share: Rule::pull turns the cotangents of a step's states into those before it.
    template <class Rule>
    struct Back {
        using Element = E;
        static constexpr bool kBack = true;
        static constexpr int kStates = S, kFrom = G, kTo = 1;
        In<1> ct_y;
        States<const E> ct_last;
        Out<G> ct_a, ct_u;
        States<E> ct_first;
        Rule rule;

        __device__ void begin(std::int64_t row, std::int64_t j, float* s) const { ct_last.load(row, j, s); }
        __device__ void prefetch(std::int64_t at, std::int64_t j) const { ct_y.fetch(at, j), rule.prefetch(at, j); }
        __device__ void step(std::int64_t, std::int64_t at, std::int64_t j, const float* p, float* ct, float* left) const {
            float y[1], u[G];
            ct_y.load(at, j, y);
            ct[0] += y[0] + p[0];
            rule.pull(at, j, ct, left, u);
            ct_a.store(at, j, left);
            if (Cell::kSplit) ct_u.store(at, j, u);
        }
        __device__ void skip(std::int64_t at, std::int64_t j, const float* p, float* ct, float* left) const {
            ct_a.clear(at, j), ct_u.clear(at, j), rule.clear(at, j);
            ct[0] += p[0];
            for (int g = 0; g < G; ++g) left[g] = 0;
        }
        __device__ void end(std::int64_t row, std::int64_t j, const float* ct) const { ct_first.store(row, j, ct); }
    };

    struct Vjp {
        In<K> kept;
        States<const E> before;
        States<E> cts;  // the total cotangents of the states after each step

        __device__ void prefetch(std::int64_t at, std::int64_t j) const { kept.fetch(at, j), before.fetch(at, j); }
        __device__ void pull(std::int64_t at, std::int64_t j, float* ct, float* ct_a, float* ct_u) const {
            float gates[K], s[S], total[S];
            kept.load(at, j, gates);
            before.load(at, j, s);
            Cell::total(gates, s, ct);
            cts.store(at, j, ct);
            for (int i = 0; i < S; ++i) total[i] = ct[i];
            Cell::vjp(gates, s, total, ct_a, ct_u, ct);
        }
        __device__ void clear(std::int64_t at, std::int64_t j) const { cts.clear(at, j); }
    };

    static Plan vjp(const Call& call) {
        Tensors<E> tensors(call);
        const std::int64_t H = call.sizes.at(3);
        const In<1> ct_y{tensors.next(), H};
        const E* w = tensors.next();
        const In<K> kept{tensors.next(), H};
        const auto before = states<const E>(tensors, H, false), ct_last = states<const E>(tensors, H);
        const void* lengths = tensors.next();
        const Out<G> ct_a{tensors.next(), H}, ct_u{tensors.next(Cell::kSplit), H};
        const auto ct_first = states<E>(tensors, H), cts = states<E>(tensors, H);
        tensors.finish();
        return run(call, w, lengths, Back<Vjp>{ct_y, ct_last, ct_a, ct_u, ct_first, {kept, before, cts}});
    }

    // ct_a and ct_u of all steps, from the total cotangents.
    struct Cotangents {
        States<const E> cts;
        In<K> kept;
        States<const E> before;
        Out<G> ct_a, ct_u;

        __device__ void step(std::int64_t at, std::int64_t j) const {
            float gates[K], s[S], ct[S], a[G], u[G], back[S];
            cts.load(at, j, ct);
            kept.load(at, j, gates);
            before.load(at, j, s);
            Cell::vjp(gates, s, ct, a, u, back);
            ct_a.store(at, j, a);
            if (Cell::kSplit) ct_u.store(at, j, u);
        }
    };

    static Plan cotangents(const Call& call) {
        Tensors<E> tensors(call);
        const auto& size = call.sizes;
        const std::int64_t tokens = size.at(0) * size.at(1) * size.at(2), H = size.at(3);
        const auto cts = states<const E>(tensors, H);
        const In<K> kept{tensors.next(), H};
        const auto before = states<const E>(tensors, H, false);
        const Out<G> ct_a{tensors.next(), H}, ct_u{tensors.next(Cell::kSplit), H};
        tensors.finish();
        const Cotangents rule{cts, kept, before, ct_a, ct_u};
        if (tokens && H) spread_over(tokens * H, apply<Cotangents>, call.stream, tokens, H, rule);
        return {};
    }

    struct VjpJvp {
        In<K> kept, t_kept;
        States<const E> before, t_before, cts;
        In<1> source;  // what reaches the state before each step beside the recurrence: ct_a t_W_hh

        __device__ void prefetch(std::int64_t at, std::int64_t j) const {
            kept.fetch(at, j), t_kept.fetch(at, j), before.fetch(at, j), t_before.fetch(at, j);
            cts.fetch(at, j), source.fetch(at, j);
        }
        __device__ void pull(std::int64_t at, std::int64_t j, float* t_ct, float* t_ct_a, float* t_ct_u) const {
            float gates[K], t_gates[K], s[S], t_s[S], ct[S], t_total[S], extra[1];
            kept.load(at, j, gates);
            t_kept.load(at, j, t_gates);
            before.load(at, j, s);
            t_before.load(at, j, t_s);
            cts.load(at, j, ct);
            source.load(at, j, extra);
            for (int i = 0; i < S; ++i) t_total[i] = t_ct[i];
            Cell::vjp_jvp(gates, s, t_gates, t_s, ct, t_total, t_ct_a, t_ct_u, t_ct);
            t_ct[0] += extra[0];
        }
        __device__ void clear(std::int64_t, std::int64_t) const {}
    };

    static Plan vjp_jvp(const Call& call) {
        Tensors<E> tensors(call);
        const std::int64_t H = call.sizes.at(3);
        const auto cts = states<const E>(tensors, H);
        const E* w = tensors.next();
        const In<K> kept{tensors.next(), H};
        const auto before = states<const E>(tensors, H, false);
        const In<K> t_kept{tensors.next(), H};
        const auto t_before = states<const E>(tensors, H, false);
        const In<1> source{tensors.next(), H}, t_ct_y{tensors.next(), H};
        const auto t_ct_last = states<const E>(tensors, H);
        const void* lengths = tensors.next();
        const Out<G> t_ct_a{tensors.next(), H}, t_ct_u{tensors.next(Cell::kSplit), H};
        const auto t_ct_first = states<E>(tensors, H);
        tensors.finish();
        const VjpJvp rule{kept, t_kept, before, t_before, cts, source};
        return run(call, w, lengths, Back<VjpJvp>{t_ct_y, t_ct_last, t_ct_a, t_ct_u, t_ct_first, rule});
    }
};

// The rows of a cell in the table of kernels.
#define METAKERN_RULE(cell, rule, Cell) {cell "_" #rule, {Recurrent<float, Cell>::rule, Recurrent<Bf16, Cell>::rule}}
#define METAKERN_RULES(cell, Cell)                                                                         \
    METAKERN_RULE(cell, forward, Cell), METAKERN_RULE(cell, jvp, Cell), METAKERN_RULE(cell, vjp, Cell),    \
        METAKERN_RULE(cell, cotangents, Cell), METAKERN_RULE(cell, vjp_jvp, Cell)

}  // namespace metakern::cuda
