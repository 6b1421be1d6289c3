// The instructions of instructions.h: loops over the outer dimensions, and vectors along the last one.
#include "../instructions.h"

#include <tuple>
#include <utility>

#include "elementwise.h"

namespace metakern::METAKERN_ISA {

namespace {

// Calls body(pointers) at each index of the first `dims` dimensions, with the addresses in the result and `inputs`
// inputs.
template <int inputs, class Body>
inline void walk(const Instruction& p, int dims, const int64_t (&bytes)[inputs + 1], Body body) {
    int64_t index[kMostDims] = {};
    char* at[inputs + 1];
    for (int j = 0; j <= inputs; ++j) at[j] = static_cast<char*>(p.tensors[j]);
    for (int d = 0; d < dims; ++d)
        if (!p.sizes[d]) return;
    for (;;) {
        body(at);
        int d = dims - 1;
        for (; d >= 0; --d) {
            for (int j = 0; j <= inputs; ++j) at[j] += p.strides[j][d] * bytes[j];
            if (++index[d] < p.sizes[d]) break;
            for (int j = 0; j <= inputs; ++j) at[j] -= p.sizes[d] * p.strides[j][d] * bytes[j];
            index[d] = 0;
        }
        if (d < 0) return;
    }
}

// Loads or stores the lanes of a vector, which are `stride` elements apart; stride 0 loads one element into all lanes.
template <class F, class... Lanes>
inline Vec<F> gathered(const F* p, int64_t stride, int64_t i, Lanes... n) {
    if (stride == 1) return load(p + i, n...);
    if (stride == 0) return splat(*p);
    F lanes[kLanes<F>] = {};
    const int64_t count = (static_cast<int64_t>(n) + ... + (sizeof...(n) ? 0 : kLanes<F>));
    for (int64_t l = 0; l < count; ++l) lanes[l] = p[(i + l) * stride];
    return load(lanes);
}
template <class F, class... Lanes>
inline void scattered(F* p, int64_t stride, int64_t i, Vec<F> v, Lanes... n) {
    if (stride == 1) return store(p + i, v, n...);
    F lanes[kLanes<F>];
    store(lanes, v);
    const int64_t count = (static_cast<int64_t>(n) + ... + (sizeof...(n) ? 0 : kLanes<F>));
    for (int64_t l = 0; l < count; ++l) p[(i + l) * stride] = lanes[l];
}

template <class F>
using Rule = Vec<F> (*)(const Vec<F>* x, F s, F t);

template <class F, int inputs, Rule<F> rule>
void map(const Instruction& p) {
    const int last = p.dims - 1;
    const int64_t count = p.sizes[last];
    int64_t bytes[inputs + 1], strides[inputs + 1];
    bool together = true, rows = p.strides[0][last] == 1;  // rows: each input is contiguous, or one number for a row
    for (int j = 0; j <= inputs; ++j) {
        bytes[j] = sizeof(F);
        strides[j] = p.strides[j][last];
        together = together && strides[j] == 1;
        rows = rows && (strides[j] == 0 || strides[j] == 1);
    }
    const F s = static_cast<F>(p.scalars[0]), t = static_cast<F>(p.scalars[1]);
    walk<inputs>(p, last, bytes, [&](char* const* at) {
        F* out = reinterpret_cast<F*>(at[0]);
        Vec<F> x[inputs + 1];
        if (together)
            each<F>(count, [&](int64_t i, auto... n) {
                for (int j = 0; j < inputs; ++j) x[j] = load(reinterpret_cast<const F*>(at[j + 1]) + i, n...);
                store(out + i, rule(x, s, t), n...);
            });
        else if (rows && count) {
            const F* from[inputs + 1];
            Vec<F> number[inputs + 1];
            for (int j = 0; j < inputs; ++j) {
                from[j] = reinterpret_cast<const F*>(at[j + 1]);
                number[j] = splat(*from[j]);
            }
            each<F>(count, [&](int64_t i, auto... n) {
                for (int j = 0; j < inputs; ++j) x[j] = strides[j + 1] ? load(from[j] + i, n...) : number[j];
                store(out + i, rule(x, s, t), n...);
            });
        } else
            each<F>(count, [&](int64_t i, auto... n) {
                for (int j = 0; j < inputs; ++j)
                    x[j] = gathered(reinterpret_cast<const F*>(at[j + 1]), strides[j + 1], i, n...);
                scattered(out, strides[0], i, rule(x, s, t), n...);
            });
    });
}

// Builtins, as of inline functions in <cmath> the linker would keep one copy for all instruction sets.
inline float raised(float x, float y) { return __builtin_powf(x, y); }
inline double raised(double x, double y) { return __builtin_pow(x, y); }
inline float sine(float x) { return __builtin_sinf(x); }
inline double sine(double x) { return __builtin_sin(x); }
inline float cosine(float x) { return __builtin_cosf(x); }
inline double cosine(double x) { return __builtin_cos(x); }
inline float tangent(float x) { return __builtin_tanf(x); }
inline double tangent(double x) { return __builtin_tan(x); }
inline float arctangent(float x) { return __builtin_atanf(x); }
inline double arctangent(double x) { return __builtin_atan(x); }

template <class F>
struct Formula {
    using V = Vec<F>;

    template <class Rule>
    static V by_lane(V x, Rule rule) {
        F lanes[kLanes<F>];
        store(lanes, x);
        for (F& lane : lanes) lane = rule(lane);
        return load(lanes);
    }

    // x^s. Small integers are multiplied out, as PyTorch does for 2 and 3.
    static V power_of(V x, F s) {
        if (s == 3) return x * x * x;
        if (s == 4) return x * x * (x * x);
        if (s == -1) return F(1) / x;
        if (s == -2) return F(1) / (x * x);
        return by_lane(x, [s](F lane) { return raised(lane, s); });
    }

#define METAKERN_FORMULA(name, inputs, formula) \
    static V name([[maybe_unused]] const V* x, [[maybe_unused]] F s, [[maybe_unused]] F t) { return formula; }
    METAKERN_ELEMENTWISE(METAKERN_FORMULA)
#undef METAKERN_FORMULA
};

// Sums along the last dimension if that is reduced, else over the other reduced dimensions, for a few vectors of
// columns at a time.
template <class F>
void sum_over(const Instruction& p) {
    const int last = p.dims - 1;
    const bool along = p.reduced > 0;
    const int kept = along ? p.dims - p.reduced : last + p.reduced;
    const int64_t count = p.sizes[last], stride = p.strides[1][last];
    const F s = static_cast<F>(p.scalars[0]);
    constexpr int64_t bytes[] = {sizeof(F), sizeof(F)};
    Instruction inner = p;  // of one element of the kept dimensions: the reduced dimensions, and the last one
    inner.dims = p.dims - kept;
    for (int d = 0; d < inner.dims; ++d) {
        inner.sizes[d] = p.sizes[kept + d];
        for (int j = 0; j < 2; ++j) inner.strides[j][d] = p.strides[j][kept + d];
    }
    walk<1>(p, kept, bytes, [&](char* const* at) {
        inner.tensors[0] = at[0];
        F* out = reinterpret_cast<F*>(at[0]);
        if (along) {
            Vec<F> total{}, more[3] = {};
            inner.tensors[1] = at[1];
            walk<1>(inner, inner.dims - 1, bytes, [&](char* const* row) {
                const F* x = reinterpret_cast<const F*>(row[1]);
                int64_t i = 0;
                if (stride == 1)
                    for (; i + 4 * kLanes<F> <= count; i += 4 * kLanes<F>) {
                        total += load(x + i);
                        for (int v = 0; v < 3; ++v) more[v] += load(x + i + (v + 1) * kLanes<F>);
                    }
                each<F>(count - i, [&](int64_t j, auto... n) {
                    total += METAKERN_ISA::first<F>(gathered(x + i * stride, stride, j, n...), n...);
                });
            });
            *out = s * sum<F>((total + more[0]) + (more[1] + more[2]));
        } else {
            constexpr int64_t kColumns = 4 * kLanes<F>;
            for (int64_t i = 0; i < count; i += kColumns) {
                const int64_t width = count - i < kColumns ? count - i : kColumns;
                Vec<F> total[4] = {};
                inner.tensors[1] = at[1] + i * stride * static_cast<int64_t>(sizeof(F));
                walk<1>(inner, inner.dims - 1, bytes, [&](char* const* row) {
                    const F* x = reinterpret_cast<const F*>(row[1]);
                    if (width == kColumns && stride == 1)
                        for (int v = 0; v < 4; ++v) total[v] += load(x + v * kLanes<F>);
                    else
                        each<F>(width, [&](int64_t j, auto... n) {
                            total[j / kLanes<F>] += gathered(x, stride, j, n...);
                        });
                });
                each<F>(width, [&](int64_t j, auto... n) {
                    scattered(out + i * p.strides[0][last], p.strides[0][last], j, s * total[j / kLanes<F>], n...);
                });
            }
        }
    });
}

// Instructions of integers and masks, one element at a time.
template <class Out, class... In, class Rule, std::size_t... j>
inline void by_element(const Instruction& p, Rule rule, std::index_sequence<j...>) {
    const int64_t bytes[] = {sizeof(Out), sizeof(In)...};
    const int last = p.dims - 1;
    const bool together = p.strides[0][last] == 1 && ((p.strides[j + 1][last] == 1) && ...);
    const int64_t count = p.sizes[last];
    walk<sizeof...(In)>(p, last, bytes, [&](char* const* at) {
        Out* const out = reinterpret_cast<Out*>(at[0]);
        const std::tuple<const In*...> from{reinterpret_cast<const In*>(at[j + 1])...};
        if (together)
            for (int64_t i = 0; i < count; ++i) out[i] = static_cast<Out>(rule(std::get<j>(from)[i]...));
        else
            for (int64_t i = 0; i < count; ++i)
                out[i * p.strides[0][last]] = static_cast<Out>(rule(std::get<j>(from)[i * p.strides[j + 1][last]]...));
    });
}
template <class Out, class... In, class Rule>
inline void by_element(const Instruction& p, Rule rule) {
    by_element<Out, In...>(p, rule, std::index_sequence_for<In...>());
}

using Bool = std::uint8_t;

template <class T>
void copy_any(const Instruction& p) {
    by_element<T, T>(p, [](T x) { return x; });
}
template <class Out, class In>
void cast(const Instruction& p) {
    by_element<Out, In>(p, [](In x) { return x; });
}
template <class T>
void fill_any(const Instruction& p) {
    by_element<T>(p, [s = static_cast<T>(p.scalars[0])] { return s; });
}
template <class T>
void where_any(const Instruction& p) {
    by_element<T, Bool, T, T>(p, [](Bool mask, T x, T y) { return mask ? x : y; });
}
void add_integers(const Instruction& p) {
    by_element<int64_t, int64_t, int64_t>(p, [s = static_cast<int64_t>(p.scalars[0])](int64_t x, int64_t y) { return x + s * y; });
}
void mul_integers(const Instruction& p) {
    by_element<int64_t, int64_t, int64_t>(p, [](int64_t x, int64_t y) { return x * y; });
}
void affine_integers(const Instruction& p) {
    const int64_t s = static_cast<int64_t>(p.scalars[0]), t = static_cast<int64_t>(p.scalars[1]);
    by_element<int64_t, int64_t>(p, [=](int64_t x) { return s * x + t; });
}
void logical_and(const Instruction& p) {
    by_element<Bool, Bool, Bool>(p, [](Bool x, Bool y) { return x && y; });
}
void logical_or(const Instruction& p) {
    by_element<Bool, Bool, Bool>(p, [](Bool x, Bool y) { return x || y; });
}
void logical_not(const Instruction& p) {
    by_element<Bool, Bool>(p, [](Bool x) { return !x; });
}

// The result may be the first operand, with stride 0 along the last dimension: then a row is reduced in registers.
template <class F>
void running_max(const Instruction& p) {
    const int last = p.dims - 1;
    const int64_t count = p.sizes[last];
    if (p.strides[0][last] || p.strides[1][last] || p.strides[2][last] != 1 || p.tensors[0] != p.tensors[1])
        return by_element<F, F, F>(p, [](F x, F y) { return x != x || x > y ? x : y; });
    constexpr int64_t bytes[] = {sizeof(F), sizeof(F), sizeof(F)};
    walk<2>(p, last, bytes, [&](char* const* at) {
        F* out = reinterpret_cast<F*>(at[0]);
        const F* x = reinterpret_cast<const F*>(at[2]);
        Vec<F> most = splat(*out);
        int64_t i = 0;
        for (; i + kLanes<F> <= count; i += kLanes<F>) {
            const Vec<F> v = load(x + i);
            most = ((most != most) | (most > v)) ? most : v;
        }
        F lanes[kLanes<F>];
        store(lanes, most);
        F highest = *out;
        for (F lane : lanes) highest = highest != highest || highest > lane ? highest : lane;
        for (; i < count; ++i) highest = highest != highest || highest > x[i] ? highest : x[i];
        *out = highest;
    });
}

#define METAKERN_COMPARISON(name, relation)                                                       \
    template <class T>                                                                            \
    void name(const Instruction& p) {                                                             \
        by_element<Bool, T>(p, [s = static_cast<T>(p.scalars[0])](T x) { return x relation s; }); \
    }                                                                                             \
    template <class T>                                                                            \
    void name##_of(const Instruction& p) {                                                        \
        by_element<Bool, T, T>(p, [](T x, T y) { return x relation y; });                         \
    }
METAKERN_COMPARISON(eq, ==)
METAKERN_COMPARISON(ne, !=)
METAKERN_COMPARISON(lt, <)
METAKERN_COMPARISON(le, <=)
METAKERN_COMPARISON(gt, >)
METAKERN_COMPARISON(ge, >=)

template <class F>
void add_rows(void* to, const void* from, const int64_t* index, int64_t rows, int64_t D, double scale) {
    const F s = static_cast<F>(scale);
    for (int64_t r = 0; r < rows; ++r) {
        F* out = static_cast<F*>(to) + index[r] * D;
        const F* x = static_cast<const F*>(from) + r * D;
        each<F>(D, [&](int64_t i, auto... n) { add(out + i, s * load(x + i, n...), n...); });
    }
}

constexpr InstructionKernels kernels() {
    InstructionKernels k{};
#define METAKERN_FLOATS(name, inputs, formula)                             \
    k.run[k_##name][kFloat32] = map<float, inputs, Formula<float>::name>; \
    k.run[k_##name][kFloat64] = map<double, inputs, Formula<double>::name>;
    METAKERN_ELEMENTWISE(METAKERN_FLOATS)
#undef METAKERN_FLOATS
#define METAKERN_CASTS(name, In)                        \
    k.run[k_##name][kFloat32] = cast<float, In>;        \
    k.run[k_##name][kFloat64] = cast<double, In>;       \
    k.run[k_##name][kInt64] = cast<int64_t, In>;
    METAKERN_CASTS(from_float32, float)
    METAKERN_CASTS(from_float64, double)
    METAKERN_CASTS(from_int64, int64_t)
    METAKERN_CASTS(from_bool, Bool)
#define METAKERN_TYPES(name, rule)              \
    k.run[k_##name][kFloat32] = rule<float>;    \
    k.run[k_##name][kFloat64] = rule<double>;   \
    k.run[k_##name][kInt64] = rule<int64_t>;    \
    k.run[k_##name][kBool] = rule<Bool>;
    METAKERN_TYPES(where, where_any)
#define METAKERN_COMPARISONS(name) METAKERN_TYPES(name, name) METAKERN_TYPES(name##_of, name##_of)
    METAKERN_COMPARISONS(eq)
    METAKERN_COMPARISONS(ne)
    METAKERN_COMPARISONS(lt)
    METAKERN_COMPARISONS(le)
    METAKERN_COMPARISONS(gt)
    METAKERN_COMPARISONS(ge)
    k.run[k_running_max][kFloat32] = running_max<float>;
    k.run[k_running_max][kFloat64] = running_max<double>;
    k.run[k_sum][kFloat32] = sum_over<float>;
    k.run[k_sum][kFloat64] = sum_over<double>;
    k.run[k_copy][kInt64] = copy_any<int64_t>;
    k.run[k_copy][kBool] = copy_any<Bool>;
    k.run[k_fill][kInt64] = fill_any<int64_t>;
    k.run[k_fill][kBool] = fill_any<Bool>;
    k.run[k_add][kInt64] = add_integers;
    k.run[k_mul][kInt64] = mul_integers;
    k.run[k_affine][kInt64] = affine_integers;
    k.run[k_logical_and][kBool] = logical_and;
    k.run[k_logical_or][kBool] = logical_or;
    k.run[k_logical_not][kBool] = logical_not;
    k.add_rows[0] = add_rows<float>;
    k.add_rows[1] = add_rows<double>;
    return k;
}

}  // namespace

extern const InstructionKernels instruction_kernels;
const InstructionKernels instruction_kernels = kernels();

}  // namespace metakern::METAKERN_ISA
