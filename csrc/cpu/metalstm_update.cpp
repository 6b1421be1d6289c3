// metalstm_update: one step of an LSTM that updates parameters, for all coordinates of all tasks. The formulas are in
// metakern/ops/metalstm_update/__init__.py.
//
// The lanes of a vector are coordinates. A block of coordinates goes through both layers at once, so that the hidden
// units of one block are all that a rule holds. The first layer's arguments are products of one packed matrix with
// (h, u(grad), 1), and those of the gates with (h', phi, last gate, 1). jvp and vjp_jvp are forward and vjp of dual
// numbers.
#include <cmath>
#include <type_traits>

#include "rows.h"

namespace metakern::METAKERN_ISA {

// x + e t with e^2 = 0: a value and its tangent.
template <class V>
struct Dual {
    V value, tangent;
};
template <class A, class B>
inline auto operator*(Dual<A> a, Dual<B> b) {
    return Dual<decltype(a.value * b.value)>{a.value * b.value, a.tangent * b.value + a.value * b.tangent};
}
template <class V>
inline Dual<V> operator+(Dual<V> a, Dual<V> b) {
    return {a.value + b.value, a.tangent + b.tangent};
}
template <class V>
inline Dual<V> operator-(Dual<V> a, Dual<V> b) {
    return {a.value - b.value, a.tangent - b.tangent};
}

// Coordinates of a unit of work, whose sums for the weights are added up in the order of units.
constexpr int64_t kCoordinates = 512;
// Vectors of coordinates in a block: as many as keep a block of 20 hidden units in the L1 cache.
constexpr int kVectors = 128 / METAKERN_BYTES;

template <class F, bool dual, bool backward>
struct MetaLSTMUpdate {
    using V = Vec<F>;
    using N = std::conditional_t<dual, Dual<V>, V>;  // numbers of coordinates
    using W = std::conditional_t<dual, Dual<F>, F>;  // weights
    static constexpr int64_t kLanesOfBlock = kVectors * kLanes<F>;

    // The tensors of a kernel, in its signature's order; tangents are null if absent.
    struct Tensor {
        const F *value, *tangent;
    };
    enum { kPhi, kGrad, kH, kC, kGates, kWX, kWHH, kB, kWH, kOwn, kInputs };
    Tensor x[kInputs], ct[4];
    F* out[kInputs];
    int64_t T, n, H, packed;  // packed: the number of weights
    F p, threshold, steep;

    static void run(const Args& args) {
        MetaLSTMUpdate(args).units(args.threads);
    }

    explicit MetaLSTMUpdate(const Args& args)
        : T(args.sizes[0]), n(args.sizes[1]), H(args.sizes[2]), packed(4 * H * (H + 3) + 2 * (H + 3)), p(F(args.scalars[0])),
          threshold(F(std::exp(-args.scalars[0]))), steep(F(std::exp(args.scalars[0]))) {
        Tensors<F> tensors(args);
        for (auto& each : x) each.value = tensors.next();
        for (auto& each : x) each.tangent = tensors.next(dual);
        for (auto& each : ct) each.value = tensors.next(backward);
        for (auto& each : ct) each.tangent = tensors.next(dual && backward);
        for (int i = 0; i < (backward ? kInputs : 4); ++i) out[i] = tensors.next();
    }

    static N number(V value, V tangent) {
        if constexpr (dual) return {value, tangent};
        else return value;
    }
    static V value(N x) {
        if constexpr (dual) return x.value;
        else return x;
    }
    // What a rule returns of a number: its tangent if there is one.
    static V result(N x) {
        if constexpr (dual) return x.tangent;
        else return x;
    }
    static N constant(F c) { return number(splat(c), V{}); }
    static N sigmoid_of(N x) {
        const V s = F(1) / (F(1) + exp<F>(-value(x)));
        if constexpr (dual) return {s, s * (F(1) - s) * x.tangent};
        else return s;
    }
    static N tanh_number(N x) {
        const V y = tanh_of<F>(value(x));
        if constexpr (dual) return {y, (F(1) - y * y) * x.tangent};
        else return y;
    }

    W weight(int input, int64_t i) const {
        if constexpr (dual) return {x[input].value[i], x[input].tangent ? x[input].tangent[i] : F(0)};
        else return x[input].value[i];
    }
    // The weights of a task as [H, H + 3, 4 gates], then [H + 3, 2 gates].
    void pack(int64_t t, W* w) const {
        for (int64_t j = 0; j < H; ++j)
            for (int64_t k = 0; k < H + 3; ++k)
                for (int64_t g = 0; g < 4; ++g) {
                    const int64_t row = (t * 4 + g) * H + j;
                    *w++ = k < H ? weight(kWHH, row * H + k) : k < H + 2 ? weight(kWX, row * 2 + k - H) : weight(kB, row);
                }
        for (int64_t k = 0; k < H + 3; ++k)
            for (int64_t g = 0; g < 2; ++g)
                *w++ = k < H ? weight(kWH, (t * 2 + g) * H + k) : weight(kOwn, (t * 2 + g) * 3 + k - H);
    }
    // The inverse of `pack`, for sums.
    void unpack(int64_t t, const F* sums) const {
        for (int64_t j = 0; j < H; ++j)
            for (int64_t k = 0; k < H + 3; ++k)
                for (int64_t g = 0; g < 4; ++g) {
                    const int64_t row = (t * 4 + g) * H + j;
                    (k < H ? out[kWHH][row * H + k] : k < H + 2 ? out[kWX][row * 2 + k - H] : out[kB][row]) = *sums++;
                }
        for (int64_t k = 0; k < H + 3; ++k)
            for (int64_t g = 0; g < 2; ++g)
                (k < H ? out[kWH][(t * 2 + g) * H + k] : out[kOwn][(t * 2 + g) * 3 + k - H]) = *sums++;
    }

    // The coordinates of a block: the first one, and how many there are.
    struct Block {
        int64_t first, size;

        int64_t lanes(int m) const {
            const int64_t left = size - m * kLanes<F>;
            return left < 0 ? 0 : left < kLanes<F> ? left : kLanes<F>;
        }
    };
    static V lanes_of(const F* from, int64_t lanes) {
        return lanes == kLanes<F> ? load(from) : lanes ? load(from, lanes) : V{};
    }
    // Vector m of row `row` of a tensor [rows, n].
    N at(Tensor from, int64_t row, const Block& block, int m) const {
        const int64_t i = row * n + block.first + m * kLanes<F>, lanes = block.lanes(m);
        return number(lanes_of(from.value + i, lanes), from.tangent ? lanes_of(from.tangent + i, lanes) : V{});
    }
    void put(F* to, int64_t row, const Block& block, int m, N x) const {
        const int64_t lanes = block.lanes(m);
        if (lanes) store(to + row * n + block.first + m * kLanes<F>, result(x), lanes);
    }

    // u and its slopes at a gradient.
    struct Read {
        N log, sign, log_slope, sign_slope;
    };
    Read read(N grad) const {
        const V z = value(grad), zero{};
        const auto large = abs<F>(z) >= threshold;
        const V slope = large ? F(1) / (p * z) : zero, linear = large ? zero : zero + steep;
        const V log_z = large ? log<F>(abs<F>(z)) / p : zero - F(1);
        const V sign = large ? (z < F(0) ? zero - F(1) : zero + F(1)) : steep * z;
        if constexpr (dual)
            return {{log_z, slope * grad.tangent},
                    {sign, linear * grad.tangent},
                    {slope, -p * slope * slope * grad.tangent},
                    {linear, zero}};
        else return {log_z, sign, slope, linear};
    }

    void units(int threads) const {
        const int64_t per_task = n ? (n + kCoordinates - 1) / kCoordinates : 1;
        const Scratch scratch(backward ? T * per_task * packed * static_cast<int64_t>(sizeof(F)) : 0);
        F* partial = scratch.as<F>();
        parallel_for(T * per_task, T * n * H < kUnit / 16 ? 1 : threads, [&](int64_t unit) {
            const int64_t t = unit / per_task, begin = unit % per_task * kCoordinates;
            const int64_t end = begin + kCoordinates < n ? begin + kCoordinates : n;
            const int64_t numbers = (H + 3 + H + 3 + 10 * H) * kVectors;
            const int64_t bytes = numbers * static_cast<int64_t>(sizeof(N)) + packed * static_cast<int64_t>(sizeof(V) + sizeof(W));
            N* memory = static_cast<N*>(thread_memory(bytes));
            V* sums = reinterpret_cast<V*>(memory + numbers);
            W* weights = reinterpret_cast<W*>(sums + packed);
            pack(t, weights);
            if (backward) std::memset(sums, 0, static_cast<std::size_t>(packed) * sizeof(V));
            for (int64_t i = begin; i < end; i += kLanesOfBlock)
                block(t, {i, end - i < kLanesOfBlock ? end - i : kLanesOfBlock}, weights, memory, sums);
            if (backward)
                for (int64_t i = 0; i < packed; ++i) partial[unit * packed + i] = sum<F>(sums[i]);
        });
        if (!backward) return;
        for (int64_t t = 0; t < T; ++t) {
            F* total = partial + t * per_task * packed;
            for (int64_t unit = 1; unit < per_task; ++unit)
                for (int64_t i = 0; i < packed; ++i) total[i] += total[unit * packed + i];
            unpack(t, total);
        }
    }

    void block(int64_t t, const Block& block, const W* w, N* memory, V* sums) const {
        const int64_t K = H + 3;
        const W* v = w + 4 * H * K;
        N *z = memory, *q = z + K * kVectors, *kept = q + K * kVectors, *ct_a = kept + 6 * H * kVectors;
        N phi[kVectors], grad[kVectors], gates[2][kVectors], next[2][kVectors], slopes[2][kVectors];
        for (int m = 0; m < kVectors; ++m) {
            phi[m] = at(x[kPhi], t, block, m);
            grad[m] = at(x[kGrad], t, block, m);
            for (int g = 0; g < 2; ++g) gates[g][m] = at(x[kGates], t * 2 + g, block, m);
            const Read u = read(grad[m]);
            for (int64_t k = 0; k < H; ++k) z[k * kVectors + m] = at(x[kH], t * H + k, block, m);
            z[H * kVectors + m] = u.log, z[(H + 1) * kVectors + m] = u.sign;
            z[(H + 2) * kVectors + m] = constant(1);
            slopes[0][m] = u.log_slope, slopes[1][m] = u.sign_slope;
        }
        for (int64_t j = 0; j < H; ++j) {
            N a[4][kVectors] = {};
            for (int64_t k = 0; k < K; ++k)
                for (int g = 0; g < 4; ++g)
                    for (int m = 0; m < kVectors; ++m) a[g][m] = a[g][m] + z[k * kVectors + m] * w[(j * K + k) * 4 + g];
            for (int m = 0; m < kVectors; ++m) {
                const N i = sigmoid_of(a[0][m]), f = sigmoid_of(a[1][m]), g = tanh_number(a[2][m]), o = sigmoid_of(a[3][m]);
                const N c = at(x[kC], t * H + j, block, m), c_next = f * c + i * g, e = tanh_number(c_next);
                q[j * kVectors + m] = o * e;
                if (backward) {
                    N* own = kept + (j * kVectors + m) * 6;
                    own[0] = i, own[1] = f, own[2] = g, own[3] = o, own[4] = e, own[5] = c;
                } else {
                    put(out[2], t * H + j, block, m, c_next);
                    put(out[1], t * H + j, block, m, o * e);
                }
            }
        }
        for (int g = 0; g < 2; ++g)
            for (int m = 0; m < kVectors; ++m) {
                N s = phi[m] * v[H * 2 + g] + gates[g][m] * v[(H + 1) * 2 + g] + constant(1) * v[(H + 2) * 2 + g];
                for (int64_t k = 0; k < H; ++k) s = s + q[k * kVectors + m] * v[k * 2 + g];
                next[g][m] = sigmoid_of(s);
            }
        if (!backward) {
            for (int m = 0; m < kVectors; ++m) {
                put(out[0], t, block, m, next[1][m] * phi[m] - next[0][m] * grad[m]);
                for (int g = 0; g < 2; ++g) put(out[3], t * 2 + g, block, m, next[g][m]);
            }
            return;
        }
        const N one = constant(1);
        N ct_phi[kVectors], ct_grad[kVectors], ct_s[2][kVectors];
        V* sums_v = sums + 4 * H * K;
        for (int m = 0; m < kVectors; ++m) {
            const N ct_p = at(ct[0], t, block, m);
            ct_phi[m] = next[1][m] * ct_p;
            ct_grad[m] = constant(0) - next[0][m] * ct_p;
            for (int g = 0; g < 2; ++g) {
                const N along = g ? phi[m] * ct_p : constant(0) - grad[m] * ct_p;
                ct_s[g][m] = (at(ct[3], t * 2 + g, block, m) + along) * next[g][m] * (one - next[g][m]);
                ct_phi[m] = ct_phi[m] + ct_s[g][m] * v[H * 2 + g];
                put(out[kGates], t * 2 + g, block, m, ct_s[g][m] * v[(H + 1) * 2 + g]);
                sums_v[H * 2 + g] += result(ct_s[g][m] * phi[m]);
                sums_v[(H + 1) * 2 + g] += result(ct_s[g][m] * gates[g][m]);
                sums_v[(H + 2) * 2 + g] += result(ct_s[g][m]);
            }
            put(out[kPhi], t, block, m, ct_phi[m]);
        }
        for (int64_t j = 0; j < H; ++j)
            for (int m = 0; m < kVectors; ++m) {
                const N* own = kept + (j * kVectors + m) * 6;
                const N i = own[0], f = own[1], g = own[2], o = own[3], e = own[4], c = own[5];
                N ct_h = at(ct[1], t * H + j, block, m);
                for (int s = 0; s < 2; ++s) {
                    ct_h = ct_h + ct_s[s][m] * v[j * 2 + s];
                    sums_v[j * 2 + s] += result(ct_s[s][m] * q[j * kVectors + m]);
                }
                const N ct_c = at(ct[2], t * H + j, block, m) + ct_h * o * (one - e * e);
                N* a = ct_a + j * 4 * kVectors + m;
                a[0] = ct_c * g * i * (one - i);
                a[kVectors] = ct_c * c * f * (one - f);
                a[2 * kVectors] = ct_c * i * (one - g * g);
                a[3 * kVectors] = ct_h * e * o * (one - o);
                put(out[kC], t * H + j, block, m, f * ct_c);
            }
        for (int64_t k = 0; k < H + 2; ++k) {
            N parts[4][kVectors] = {};
            for (int64_t j = 0; j < H; ++j)
                for (int g = 0; g < 4; ++g)
                    for (int m = 0; m < kVectors; ++m)
                        parts[g][m] = parts[g][m] + ct_a[(j * 4 + g) * kVectors + m] * w[(j * K + k) * 4 + g];
            for (int m = 0; m < kVectors; ++m) {
                const N total = parts[0][m] + parts[1][m] + (parts[2][m] + parts[3][m]);
                if (k < H) put(out[kH], t * H + k, block, m, total);
                else ct_grad[m] = ct_grad[m] + total * slopes[k - H][m];
            }
        }
        for (int m = 0; m < kVectors; ++m) put(out[kGrad], t, block, m, ct_grad[m]);
        for (int64_t j = 0; j < H; ++j)
            for (int64_t k = 0; k < K; ++k)
                for (int g = 0; g < 4; ++g) {
                    V total = sums[(j * K + k) * 4 + g];
                    for (int m = 0; m < kVectors; ++m)
                        total += result(ct_a[(j * 4 + g) * kVectors + m] * z[k * kVectors + m]);
                    sums[(j * K + k) * 4 + g] = total;
                }
    }
};

#define METAKERN_X "phi:TN grad:TN h:THN c:THN gates:T2N w_x:T8H w_hh:T4HH b:T4H w_h:T2H w_own:T6 "
#define METAKERN_T_X \
    "t_phi:TN? t_grad:TN? t_h:THN? t_c:THN? t_gates:T2N? t_w_x:T8H? t_w_hh:T4HH? t_b:T4H? t_w_h:T2H? t_w_own:T6? "
#define METAKERN_CT "ct_phi:TN ct_h:THN ct_c:THN ct_gates:T2N "

extern const Kernel metalstm_update_kernels[] = {
    {"metalstm_update_forward",
     METAKERN_X "-> next_phi:TN next_h:THN next_c:THN next_gates:T2N",
     1,
     {MetaLSTMUpdate<float, false, false>::run, MetaLSTMUpdate<double, false, false>::run}},
    {"metalstm_update_jvp",
     METAKERN_X METAKERN_T_X "-> t_next_phi:TN t_next_h:THN t_next_c:THN t_next_gates:T2N",
     1,
     {MetaLSTMUpdate<float, true, false>::run, MetaLSTMUpdate<double, true, false>::run}},
    {"metalstm_update_vjp",
     METAKERN_X METAKERN_CT
     "-> ct_x_phi:TN ct_grad:TN ct_x_h:THN ct_x_c:THN ct_x_gates:T2N ct_w_x:T8H ct_w_hh:T4HH ct_b:T4H ct_w_h:T2H ct_w_own:T6",
     1,
     {MetaLSTMUpdate<float, false, true>::run, MetaLSTMUpdate<double, false, true>::run}},
    {"metalstm_update_vjp_jvp",
     METAKERN_X METAKERN_T_X METAKERN_CT
     "t_ct_phi:TN? t_ct_h:THN? t_ct_c:THN? t_ct_gates:T2N? "
     "-> t_ct_x_phi:TN t_ct_grad:TN t_ct_x_h:THN t_ct_x_c:THN t_ct_x_gates:T2N"
     " t_ct_w_x:T8H t_ct_w_hh:T4HH t_ct_b:T4H t_ct_w_h:T2H t_ct_w_own:T6",
     1,
     {MetaLSTMUpdate<float, true, true>::run, MetaLSTMUpdate<double, true, true>::run}},
    {}};

#undef METAKERN_X
#undef METAKERN_T_X
#undef METAKERN_CT

}  // namespace metakern::METAKERN_ISA
