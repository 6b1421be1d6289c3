// attention: softmax attention by blocks of queries and keys that stay in the caches. The derivation is in
// metakern/ops/attention. A unit of work is one head of k and v with all heads of q that share it, so that nothing is
// computed twice and each sum has a fixed order.
#include <cmath>
#include <limits>
#include <type_traits>

#include "../kernel.h"
#include "../parallel.h"
#include "matrix.h"

namespace metakern::METAKERN_ISA {

namespace {

// The queries (rows) and keys (columns) of a block. Its columns are a whole number of panels (matrix.h).
constexpr int64_t kQueries = 48, kKeys = 128;

struct Range {
    int64_t begin, end;
};

// v in the lanes whose column is in the range, `other` (zero if not given) in the rest. Lane 0 is column j.
template <class F>
inline Vec<F> within(Range range, int64_t j, Vec<F> v, Vec<F> other = Vec<F>{}) {
    using Int = std::conditional_t<sizeof(F) == 4, std::int32_t, std::int64_t>;
    decltype(v < v) at;
    for (int64_t i = 0; i < kLanes<F>; ++i) at[i] = static_cast<Int>(j + i);
    return ((at >= static_cast<Int>(range.begin)) & (at < static_cast<Int>(range.end))) ? v : other;
}

// The sizes and options of a call, for q [B, H, L, D] and k, v [B, G, M, D]. `group` heads of q share a head of k and
// v; `wide` is D rounded up to whole panels.
template <class F>
struct Call {
    const Args& args;
    const int64_t B, H, L, D, G, M, group, wide;
    const F scale;
    const bool causal;
    const int64_t window;  // 0: none
    const int64_t* const seen;

    explicit Call(const Args& a)
        : args(a), B(a.sizes[0]), H(a.sizes[1]), L(a.sizes[2]), D(a.sizes[3]), G(a.sizes[4]), M(a.sizes[5]),
          group(G ? H / G : 0), wide(panels<F>(D) * kPanel<F>), scale(static_cast<F>(a.scalars[0])),
          causal(a.scalars[1] != 0), window(static_cast<int64_t>(a.scalars[2])), seen(a.tensor<const int64_t>(3)) {}

    // The range of the keys [j, j + width) that query i sees by its position, counted from j.
    Range visible(int64_t i, int64_t j, int64_t width) const {
        const int64_t at = i + M - L - j;
        const auto clamped = [&](int64_t x) { return x < 0 ? 0 : x < width ? x : width; };
        return {window ? clamped(at - window + 1) : 0, causal ? clamped(at + 1) : width};
    }
};

// A block: queries [i, i + rows) of head h of the unit, and keys [j, j + width). Its queries see no keys outside of
// [begin, end), which count from j; `begin` is the first column of a panel.
struct Block {
    int64_t h, i, rows, j, width, begin, end;
};

// One unit of work: a head of k and v with its heads of q, and scratch memory of the thread.
template <class F>
class Unit {
public:
    // Takes memory for `tiles` tiles [kQueries, kKeys], 2 * `sides` packed blocks of keys or queries, and `vectors`
    // vectors of a number for each query of the unit.
    Unit(const Call<F>& call, int64_t b, int64_t g, int64_t tiles, int64_t sides, int64_t vectors)
        : c(call), products_{call.args.bfloat16}, b_(b), g_(g) {
        const int64_t tile = kQueries * kKeys, side = kKeys * c.wide, vector = (c.group * c.L + 15) / 16 * 16;
        const int64_t count = tiles * tile + 2 * sides * side + vectors * vector + kKeys + kKeys * ((c.D + 15) / 16 * 16);
        next_ = static_cast<F*>(thread_memory(count * static_cast<int64_t>(sizeof(F))));
        bias_ = take(kKeys);
        copy_ = take(kKeys * ((c.D + 15) / 16 * 16));
    }

    F* tile() { return take(kQueries * kKeys); }
    F* side() { return take(kKeys * c.wide); }
    F* vector() { return take((c.group * c.L + 15) / 16 * 16); }

    // The address in tensor number n of the unit's first query, of its first sum over keys, or of its first key; null
    // if the tensor is absent.
    F* queries(int n) const { return at(n, (b_ * c.H + g_ * c.group) * c.L * c.D); }
    F* sums(int n) const { return at(n, (b_ * c.H + g_ * c.group) * c.L); }
    F* keys(int n) const { return at(n, (b_ * c.G + g_) * c.M * c.D); }
    void clear_queries(F* p) const { std::memset(p, 0, static_cast<std::size_t>(c.group * c.L * c.D) * sizeof(F)); }
    void clear_keys(F* p) const { std::memset(p, 0, static_cast<std::size_t>(c.M * c.D) * sizeof(F)); }

    // For each block of keys, calls keys(j, width), then queries(block) for each block of queries that sees some of
    // them.
    template <class Keys, class Queries>
    void sweep(Keys keys, Queries queries) {
        const int64_t offset = c.M - c.L;
        for (int64_t j = 0; j < c.M; j += kKeys) {
            const int64_t width = c.M - j < kKeys ? c.M - j : kKeys;
            const int64_t first = c.causal && j > offset ? j - offset : 0, past = j + width - 1 - offset + c.window;
            const int64_t last = c.window && past < c.L ? past : c.L, count = last - first;
            if (count <= 0 || !look(j, width)) continue;
            keys(j, width);
            const int64_t blocks = (count + kQueries - 1) / kQueries;
            for (int64_t h = 0; h < c.group; ++h)
                for (int64_t n = 0; n < blocks; ++n) {
                    const int64_t i = first + count * n / blocks, rows = first + count * (n + 1) / blocks - i;
                    const int64_t begin = c.visible(i, j, width).begin / kPanel<F> * kPanel<F>;
                    queries(Block{h, i, rows, j, width, begin, c.visible(i + rows - 1, j, width).end});
                }
        }
    }

    // Packs a block of x [M, D] (keys or values), with zeros for keys that the mask hides, as the right factor of a
    // product: transposed for products with rows of queries, and as it is for products with tiles.
    void pack_for_scores(F* to, const F* x, int64_t j, int64_t width) {
        products_.pack(to, {shown(x, j, width), 1, c.D}, c.D, width, 0, panels<F>(width));
    }
    void pack_for_sums(F* to, const F* x, int64_t j, int64_t width) {
        products_.pack(to, {shown(x, j, width), c.D, 1}, width, c.D, 0, panels<F>(c.D));
    }
    // Packs a block of queries of x as the right factor of a product with a transposed tile.
    void pack_queries(F* to, const F* x, const Block& k) {
        products_.pack(to, {x + (k.h * c.L + k.i) * c.D, c.D, 1}, k.rows, c.D, 0, panels<F>(c.D));
    }

    // tile = or += x keysᵀ
    void scores(F* tile, const F* x, const F* keys, const Block& k, bool more = false) const {
        F* to = tile + k.begin;
        products_.multiply(k.rows, k.end - k.begin, c.D, {x + (k.h * c.L + k.i) * c.D, c.D, 1}, keys + k.begin * c.D,
                    {to, kKeys, more ? to : nullptr, kKeys});
    }
    // x += tile keys
    void sum_to_queries(F* x, const F* tile, const F* keys, const Block& k) const {
        F* to = x + (k.h * c.L + k.i) * c.D;
        products_.multiply(k.rows, c.D, k.end - k.begin, {tile + k.begin, kKeys, 1}, keys + products_.row(k.begin),
                    {to, c.D, to, c.D}, k.width);
    }
    // x += tileᵀ queries
    void sum_to_keys(F* x, const F* tile, const F* queries, const Block& k) const {
        F* to = x + (k.j + k.begin) * c.D;
        products_.multiply(k.end - k.begin, c.D, k.rows, {tile + k.begin, 1, kKeys}, queries, {to, c.D, to, c.D});
    }

    // Calls row(n, query, range of seen keys) for each row of a block; n counts the rows of the block, `query` those of
    // the unit.
    template <class Row>
    void rows(const Block& k, Row row) const {
        for (int64_t n = 0; n < k.rows; ++n)
            row(n, k.h * c.L + k.i + n, c.visible(k.i + n, k.j, k.width));
    }

    // Returns scale s from the products s of a row, plus the mask's -∞ for hidden keys.
    Vec<F> scaled(const F* s, int64_t j) const {
        const Vec<F> x = load(s + j) * c.scale;
        return c.seen ? x + load(bias_ + j) : x;
    }

    // out[i] = ⟨a_i, b_i⟩ for each query i, or out[i] += ⟨a_i, b_i⟩ with `more`.
    void inner_products(F* out, const F* a, const F* b, bool more = false) const {
        for (int64_t i = 0; i < c.group * c.L; ++i) {
            Vec<F> total{};
            each<F>(c.D, [&](int64_t d, auto... n) { total += load(a + i * c.D + d, n...) * load(b + i * c.D + d, n...); });
            out[i] = sum<F>(total) + (more ? out[i] : F(0));
        }
    }

private:
    F* take(int64_t count) {
        F* p = next_;
        next_ += count;
        return p;
    }
    F* at(int n, int64_t offset) const {
        F* p = c.args.template tensor<F>(n);
        return p ? p + offset : p;
    }
    // Reads the mask of a block of keys into bias_. Returns whether any of them is seen.
    bool look(int64_t j, int64_t width) {
        if (!c.seen) return true;
        bool any = false;
        for (int64_t n = 0; n < kKeys; ++n) {
            const bool shown = n < width && c.seen[b_ * c.M + j + n];
            bias_[n] = shown ? F(0) : -std::numeric_limits<F>::infinity();
            any = any || shown;
        }
        return any;
    }
    // Keys [j, j + width) of x, or a copy with zeros for those that the mask hides: 0 · NaN must not reach a sum.
    const F* shown(const F* x, int64_t j, int64_t width) {
        x += j * c.D;
        if (!c.seen) return x;
        for (int64_t n = 0; n < width; ++n) {
            const auto bytes = static_cast<std::size_t>(c.D) * sizeof(F);
            if (bias_[n] == 0)
                std::memcpy(copy_ + n * c.D, x + n * c.D, bytes);
            else
                std::memset(copy_ + n * c.D, 0, bytes);
        }
        return copy_;
    }

    const Call<F>& c;
    const Products<F> products_;
    const int64_t b_, g_;
    F *next_, *bias_, *copy_;
};

template <class F, class Body>
void for_units(const Args& args, int64_t tiles, int64_t sides, int64_t vectors, Body body) {
    const Call<F> call(args);
    const int threads = call.B * call.H * call.L * call.M * (call.D + 1) < (1 << 16) ? 1 : args.threads;
    parallel_for(call.B * call.G, threads, [&](int64_t n) {
        Unit<F> unit(call, n / call.G, n % call.G, tiles, sides, vectors);
        body(call, unit);
    });
}

template <class F>
void forward(const Args& args) {
    enum { Q, K, V, SEEN, Y, LSE };
    for_units<F>(args, 1, 1, 2, [](const Call<F>& c, Unit<F>& unit) {
        const F *q = unit.queries(Q), *k = unit.keys(K), *v = unit.keys(V);
        F *y = unit.queries(Y), *lse = unit.sums(LSE), *p = unit.tile(), *kt = unit.side(), *vs = unit.side();
        F *top = unit.vector(), *total = unit.vector();
        constexpr F infinity = std::numeric_limits<F>::infinity();
        unit.clear_queries(y);
        for (int64_t i = 0; i < c.group * c.L; ++i) top[i] = -infinity, total[i] = 0;
        unit.sweep(
            [&](int64_t j, int64_t width) {
                unit.pack_for_scores(kt, k, j, width);
                unit.pack_for_sums(vs, v, j, width);
            },
            [&](const Block& block) {
                unit.scores(p, q, kt, block);
                unit.rows(block, [&](int64_t n, int64_t query, Range seen) {
                    F* row = p + n * kKeys;
                    const Vec<F> none = Vec<F>{} - infinity;
                    Vec<F> most = none;
                    for (int64_t j = block.begin; j < block.end; j += kLanes<F>) {
                        const Vec<F> s = within<F>(seen, j, unit.scaled(row, j), none);
                        most = s > most ? s : most;
                        store(row + j, s);
                    }
                    F highest = top[query];
                    for (int64_t i = 0; i < kLanes<F>; ++i) highest = most[i] > highest ? most[i] : highest;
                    const F shift = highest == -infinity ? F(0) : highest;
                    Vec<F> added{};
                    for (int64_t j = block.begin; j < block.end; j += kLanes<F>) {
                        const Vec<F> e = exp<F>(load(row + j) - shift);
                        added += e;
                        store(row + j, e);
                    }
                    if (highest != top[query] && total[query] != 0) {
                        const F factor = exp<F>(splat(top[query] - highest))[0];
                        total[query] *= factor;
                        F* to = y + query * c.D;
                        each<F>(c.D, [&](int64_t d, auto... w) { store(to + d, load(to + d, w...) * factor, w...); });
                    }
                    top[query] = highest;
                    total[query] += sum<F>(added);
                });
                unit.sum_to_queries(y, p, vs, block);
            });
        for (int64_t i = 0; i < c.group * c.L; ++i) {
            const bool blind = total[i] == 0;
            const F factor = blind ? F(0) : F(1) / total[i];
            F* to = y + i * c.D;
            each<F>(c.D, [&](int64_t d, auto... w) { store(to + d, load(to + d, w...) * factor, w...); });
            lse[i] = blind ? infinity : top[i] + std::log(total[i]);
        }
    });
}

template <class F>
void jvp(const Args& args) {
    enum { Q, K, V, SEEN, LSE, Y, T_Q, T_K, T_V, T_Y, T_LSE };
    for_units<F>(args, 2, 2, 0, [](const Call<F>& c, Unit<F>& unit) {
        const F *q = unit.queries(Q), *k = unit.keys(K), *v = unit.keys(V), *lse = unit.sums(LSE), *y = unit.queries(Y);
        const F *t_q = unit.queries(T_Q), *t_k = unit.keys(T_K), *t_v = unit.keys(T_V);
        F *t_y = unit.queries(T_Y), *t_lse = unit.sums(T_LSE), *p = unit.tile(), *t_p = unit.tile();
        F *kt = unit.side(), *t_kt = unit.side(), *vs = unit.side(), *t_vs = unit.side();
        unit.clear_queries(t_y);
        for (int64_t i = 0; i < c.group * c.L; ++i) t_lse[i] = 0;
        unit.sweep(
            [&](int64_t j, int64_t width) {
                unit.pack_for_scores(kt, k, j, width);
                unit.pack_for_scores(t_kt, t_k, j, width);
                unit.pack_for_sums(vs, v, j, width);
                unit.pack_for_sums(t_vs, t_v, j, width);
            },
            [&](const Block& block) {
                unit.scores(p, q, kt, block);
                unit.scores(t_p, t_q, kt, block);
                unit.scores(t_p, q, t_kt, block, true);
                unit.rows(block, [&](int64_t n, int64_t query, Range seen) {
                    F *row = p + n * kKeys, *t_row = t_p + n * kKeys;
                    Vec<F> total{};
                    for (int64_t j = block.begin; j < block.end; j += kLanes<F>) {
                        const Vec<F> e = within<F>(seen, j, exp<F>(unit.scaled(row, j) - lse[query]));
                        const Vec<F> t = within<F>(seen, j, e * load(t_row + j) * c.scale);
                        total += t;
                        store(row + j, e);
                        store(t_row + j, t);
                    }
                    t_lse[query] += sum<F>(total);
                });
                unit.sum_to_queries(t_y, t_p, vs, block);
                unit.sum_to_queries(t_y, p, t_vs, block);
            });
        for (int64_t i = 0; i < c.group * c.L; ++i)
            each<F>(c.D, [&, to = t_y + i * c.D, from = y + i * c.D](int64_t d, auto... w) {
                store(to + d, load(to + d, w...) - t_lse[i] * load(from + d, w...), w...);
            });
    });
}

template <class F>
void vjp(const Args& args) {
    enum { Q, K, V, SEEN, LSE, Y, CT_Y, CT_Q, CT_K, CT_V };
    for_units<F>(args, 2, 3, 1, [](const Call<F>& c, Unit<F>& unit) {
        const F *q = unit.queries(Q), *k = unit.keys(K), *v = unit.keys(V), *lse = unit.sums(LSE);
        const F* ct_y = unit.queries(CT_Y);
        F *ct_q = unit.queries(CT_Q), *ct_k = unit.keys(CT_K), *ct_v = unit.keys(CT_V);
        F *p = unit.tile(), *ct_s = unit.tile();
        F *kt = unit.side(), *vt = unit.side(), *ks = unit.side(), *q_side = unit.side(), *ct_side = unit.side();
        F* delta = unit.vector();
        unit.clear_queries(ct_q);
        unit.clear_keys(ct_k);
        unit.clear_keys(ct_v);
        unit.inner_products(delta, ct_y, unit.queries(Y));
        unit.sweep(
            [&](int64_t j, int64_t width) {
                unit.pack_for_scores(kt, k, j, width);
                unit.pack_for_scores(vt, v, j, width);
                unit.pack_for_sums(ks, k, j, width);
            },
            [&](const Block& block) {
                unit.pack_queries(q_side, q, block);
                unit.pack_queries(ct_side, ct_y, block);
                unit.scores(p, q, kt, block);
                unit.scores(ct_s, ct_y, vt, block);
                unit.rows(block, [&](int64_t n, int64_t query, Range seen) {
                    F *row = p + n * kKeys, *ct_row = ct_s + n * kKeys;
                    for (int64_t j = block.begin; j < block.end; j += kLanes<F>) {
                        const Vec<F> e = within<F>(seen, j, exp<F>(unit.scaled(row, j) - lse[query]));
                        store(ct_row + j, e * (load(ct_row + j) - delta[query]) * c.scale);
                        store(row + j, e);
                    }
                });
                unit.sum_to_queries(ct_q, ct_s, ks, block);
                unit.sum_to_keys(ct_k, ct_s, q_side, block);
                unit.sum_to_keys(ct_v, p, ct_side, block);
            });
    });
}

template <class F>
void vjp_jvp(const Args& args) {
    enum { Q, K, V, SEEN, LSE, Y, T_Q, T_K, T_V, T_LSE, T_Y, CT_Y, T_CT_Y, T_CT_Q, T_CT_K, T_CT_V };
    for_units<F>(args, 4, 5, 2, [](const Call<F>& c, Unit<F>& unit) {
        const F *q = unit.queries(Q), *k = unit.keys(K), *v = unit.keys(V), *lse = unit.sums(LSE), *y = unit.queries(Y);
        const F *t_q = unit.queries(T_Q), *t_k = unit.keys(T_K), *t_v = unit.keys(T_V), *t_lse = unit.sums(T_LSE);
        const F *ct_y = unit.queries(CT_Y), *t_ct_y = unit.queries(T_CT_Y);
        F *t_ct_q = unit.queries(T_CT_Q), *t_ct_k = unit.keys(T_CT_K), *t_ct_v = unit.keys(T_CT_V);
        F *p = unit.tile(), *t_p = unit.tile(), *ct_s = unit.tile(), *t_ct_s = unit.tile();
        F *kt = unit.side(), *t_kt = unit.side(), *vt = unit.side(), *t_vt = unit.side();
        F *ks = unit.side(), *t_ks = unit.side();
        F *q_side = unit.side(), *t_q_side = unit.side(), *ct_side = unit.side(), *t_ct_side = unit.side();
        F *delta = unit.vector(), *t_delta = unit.vector();
        unit.clear_queries(t_ct_q);
        unit.clear_keys(t_ct_k);
        unit.clear_keys(t_ct_v);
        unit.inner_products(delta, ct_y, y);
        unit.inner_products(t_delta, ct_y, unit.queries(T_Y));
        if (t_ct_y) unit.inner_products(t_delta, t_ct_y, y, true);
        unit.sweep(
            [&](int64_t j, int64_t width) {
                unit.pack_for_scores(kt, k, j, width);
                unit.pack_for_scores(t_kt, t_k, j, width);
                unit.pack_for_scores(vt, v, j, width);
                unit.pack_for_scores(t_vt, t_v, j, width);
                unit.pack_for_sums(ks, k, j, width);
                unit.pack_for_sums(t_ks, t_k, j, width);
            },
            [&](const Block& block) {
                unit.pack_queries(q_side, q, block);
                unit.pack_queries(t_q_side, t_q, block);
                unit.pack_queries(ct_side, ct_y, block);
                unit.scores(p, q, kt, block);
                unit.scores(t_p, t_q, kt, block);
                unit.scores(t_p, q, t_kt, block, true);
                unit.scores(ct_s, ct_y, vt, block);
                unit.scores(t_ct_s, ct_y, t_vt, block);
                if (t_ct_y) {
                    unit.pack_queries(t_ct_side, t_ct_y, block);
                    unit.scores(t_ct_s, t_ct_y, vt, block, true);
                }
                unit.rows(block, [&](int64_t n, int64_t query, Range seen) {
                    F *row = p + n * kKeys, *t_row = t_p + n * kKeys, *ct_row = ct_s + n * kKeys;
                    F* t_ct_row = t_ct_s + n * kKeys;
                    for (int64_t j = block.begin; j < block.end; j += kLanes<F>) {
                        const Vec<F> e = within<F>(seen, j, exp<F>(unit.scaled(row, j) - lse[query]));
                        const Vec<F> t_e = e * (load(t_row + j) * c.scale - t_lse[query]);
                        const Vec<F> centered = load(ct_row + j) - delta[query];
                        const Vec<F> t_centered = load(t_ct_row + j) - t_delta[query];
                        store(row + j, e);
                        store(t_row + j, t_e);
                        store(ct_row + j, e * centered * c.scale);
                        store(t_ct_row + j, (t_e * centered + e * t_centered) * c.scale);
                    }
                });
                unit.sum_to_queries(t_ct_q, t_ct_s, ks, block);
                unit.sum_to_queries(t_ct_q, ct_s, t_ks, block);
                unit.sum_to_keys(t_ct_k, t_ct_s, q_side, block);
                unit.sum_to_keys(t_ct_k, ct_s, t_q_side, block);
                unit.sum_to_keys(t_ct_v, t_p, ct_side, block);
                if (t_ct_y) unit.sum_to_keys(t_ct_v, p, t_ct_side, block);
            });
    });
}

}  // namespace

extern const Kernel attention_kernels[] = {
    {"attention_forward", "q:BHLD k:BGMD v:BGMD mask:BMi? -> y:BHLD lse:BHL", 3, {forward<float>, forward<double>}},
    {"attention_jvp",
     "q:BHLD k:BGMD v:BGMD mask:BMi? lse:BHL y:BHLD t_q:BHLD t_k:BGMD t_v:BGMD -> t_y:BHLD t_lse:BHL",
     3,
     {jvp<float>, jvp<double>}},
    {"attention_vjp",
     "q:BHLD k:BGMD v:BGMD mask:BMi? lse:BHL y:BHLD ct_y:BHLD -> ct_q:BHLD ct_k:BGMD ct_v:BGMD",
     3,
     {vjp<float>, vjp<double>}},
    {"attention_vjp_jvp",
     "q:BHLD k:BGMD v:BGMD mask:BMi? lse:BHL y:BHLD t_q:BHLD t_k:BGMD t_v:BGMD t_lse:BHL t_y:BHLD ct_y:BHLD t_ct_y:BHLD?"
     " -> t_ct_q:BHLD t_ct_k:BGMD t_ct_v:BGMD",
     3,
     {vjp_jvp<float>, vjp_jvp<double>}},
    {}};

}  // namespace metakern::METAKERN_ISA
