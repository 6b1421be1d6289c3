// Vectors as wide as the registers of the instruction set that is compiled for, and the functions of them that kernels
// need. Written with the vector types of GCC and Clang, so that one text serves SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#define METAKERN_BYTES 64
#elif defined(__AVX2__)
#define METAKERN_BYTES 32
#else
#define METAKERN_BYTES 16
#endif

namespace metakern::METAKERN_ISA {

using std::int64_t;

template <class F>
struct Types;
template <>
struct Types<float> {
    typedef float Vec __attribute__((vector_size(METAKERN_BYTES)));
    typedef std::uint32_t Bits __attribute__((vector_size(METAKERN_BYTES)));
};
template <>
struct Types<double> {
    typedef double Vec __attribute__((vector_size(METAKERN_BYTES)));
    typedef std::uint64_t Bits __attribute__((vector_size(METAKERN_BYTES)));
};

template <class F>
using Vec = typename Types<F>::Vec;
template <class F>
using Bits = typename Types<F>::Bits;

// Elements of a vector.
template <class F>
constexpr int64_t kLanes = METAKERN_BYTES / sizeof(F);

// Loads and stores at any alignment. With n, only the first n lanes; a load sets the others to zero.
template <class F>
inline Vec<F> load(const F* p) {
    Vec<F> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <class F>
inline Vec<F> load(const F* p, int64_t n) {
    Vec<F> v{};
    std::memcpy(&v, p, static_cast<std::size_t>(n) * sizeof(F));
    return v;
}
template <class F>
inline void store(F* p, Vec<F> v) {
    std::memcpy(p, &v, sizeof v);
}
template <class F>
inline void store(F* p, Vec<F> v, int64_t n) {
    std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(F));
}

// Loads from p + i, or returns zero if p is null, which stands for an absent tensor or a zero tangent.
template <class F, class... Lanes>
inline Vec<F> maybe(const F* p, int64_t i, Lanes... n) {
    return p ? load(p + i, n...) : Vec<F>{};
}

// p += v
template <class F, class... Lanes>
inline void add(F* p, Vec<F> v, Lanes... n) {
    store(p, load(p, n...) + v, n...);
}

// v with zeros after the first n lanes.
template <class F>
inline Vec<F> first(Vec<F> v) {
    return v;
}
template <class F>
inline Vec<F> first(Vec<F> v, int64_t n) {
    F lanes[kLanes<F>];
    std::memcpy(lanes, &v, sizeof v);
    return load(lanes, n);
}

// Calls step(i) for each whole vector of `count` elements, then step(i, n) for the n elements that remain.
template <class F, class Step>
inline void each(int64_t count, Step step) {
    int64_t i = 0;
    for (; i + kLanes<F> <= count; i += kLanes<F>) step(i);
    if (i < count) step(i, count - i);
}

inline float root(float x) { return __builtin_sqrtf(x); }
inline double root(double x) { return __builtin_sqrt(x); }

// x. A multiplication that computes it is rounded: the compiler does not fuse it with an addition that follows, which it
// otherwise does where both are in one basic block. So results do not depend on the path that computes them.
template <class V>
inline V unfused(V x) {
#if defined(__x86_64__)
    asm("" : "+v"(x));
#elif defined(__aarch64__)
    asm("" : "+w"(x));
#else
    asm("" : "+m"(x));
#endif
    return x;
}

// The sum of all lanes, in a fixed order.
template <class F>
inline F sum(Vec<F> v) {
    F lanes[kLanes<F>];
    std::memcpy(lanes, &v, sizeof v);
    for (int64_t half = kLanes<F> / 2; half; half /= 2)
        for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}

// x limited to [low, high]. NaN stays NaN.
template <class F>
inline Vec<F> clamp(Vec<F> x, F low, F high) {
    x = x < low ? Vec<F>{} + low : x;
    return x > high ? Vec<F>{} + high : x;
}

// c[0] + c[1] x + c[2] x^2 + ...
template <class V, class F, std::size_t n>
inline V polynomial(V x, const F (&c)[n]) {
    V y = V{} + c[n - 1];
#pragma GCC unroll 32
    for (int i = static_cast<int>(n) - 2; i >= 0; --i) y = y * x + c[i];
    return y;
}

// exp(x) = 2^k exp(r) with k = round(x / ln 2) and |r| <= ln(2)/2, where the Taylor polynomial of exp is exact to rounding.
// The constants: round = 1.5 * 2^mantissa, whose sum with a small number ends in the bits of the rounded number; ln 2 in
// two parts, the first with so few bits that k * ln2_high is exact; the bounds beyond which exp is infinite or zero.
template <class F>
struct Exp;
template <>
struct Exp<float> {
    static constexpr float round = 12582912.0f, ln2_high = 0.693359375f, ln2_low = -2.12194440054690583e-4f;
    static constexpr float low = -105.0f, high = 90.0f;
    static constexpr int mantissa = 23, bias = 127;
    static constexpr float taylor[] = {1, 1, 1 / 2.f, 1 / 6.f, 1 / 24.f, 1 / 120.f, 1 / 720.f, 1 / 5040.f};
};
template <>
struct Exp<double> {
    static constexpr double round = 6755399441055744.0, ln2_high = 0x1.62e42feep-1, ln2_low = 0x1.a39ef35793c76p-33;
    static constexpr double low = -750.0, high = 711.0;
    static constexpr int mantissa = 52, bias = 1023;
    static constexpr double taylor[] = {1,
                                        1,
                                        1 / 2.,
                                        1 / 6.,
                                        1 / 24.,
                                        1 / 120.,
                                        1 / 720.,
                                        1 / 5040.,
                                        1 / 40320.,
                                        1 / 362880.,
                                        1 / 3628800.,
                                        1 / 39916800.,
                                        1 / 479001600.,
                                        1 / 6227020800.};
};

// exp(x) within 2 units in the last place, over the whole range: also where it is subnormal, zero or infinite. NaN
// stays NaN.
template <class F>
inline Vec<F> exp(Vec<F> x) {
    using E = Exp<F>;
    x = clamp<F>(x, E::low, E::high);
    const Vec<F> shifted = x * F(1.4426950408889634) + E::round;
    const Vec<F> k = shifted - E::round;
    const Vec<F> r = (x - k * E::ln2_high) - k * E::ln2_low;
    // 2^k as a product of two powers, each a normal number where 2^k itself is not.
    const Bits<F> biased = (Bits<F>)shifted - (Bits<F>)(Vec<F>{} + E::round) + 2 * E::bias;
    const Bits<F> half = biased >> 1;
    return polynomial(r, E::taylor) * (Vec<F>)(half << E::mantissa) * (Vec<F>)((biased - half) << E::mantissa);
}

template <class F>
inline Vec<F> abs(Vec<F> x) {
    return x < 0 ? -x : x;
}

// s(x) = 1 / (1 + exp(-x)) and its slope s (1 - s), both with a small relative error in both tails.
template <class F>
struct Sigmoid {
    Vec<F> value, slope;
};
template <class F>
inline Sigmoid<F> sigmoid(Vec<F> x) {
    const Vec<F> e = exp<F>(-abs<F>(x)), high = F(1) / (F(1) + e), low = e * high;
    return {x < 0 ? low : high, low * high};
}

// tanh by a rational function near zero, which keeps the relative error small, and by exp beyond (S. Moshier, Cephes).
inline Vec<float> tanh_near_zero(Vec<float> x, Vec<float> square) {
    constexpr float c[] = {-3.33332819422e-1f, 1.33314422036e-1f, -5.37397155531e-2f, 2.06390887954e-2f, -5.70498872745e-3f};
    return x + x * square * polynomial(square, c);
}
inline Vec<double> tanh_near_zero(Vec<double> x, Vec<double> square) {
    constexpr double p[] = {-1.61468768441708447952e3, -9.92877231001918586564e1, -9.64399179425052238628e-1};
    constexpr double q[] = {4.84406305325125486048e3, 2.23548839060100448583e3, 1.12811678491632931402e2, 1.0};
    return x + x * square * (polynomial(square, p) / polynomial(square, q));
}
template <class F>
inline Vec<F> tanh_of(Vec<F> x) {
    const Vec<F> size = abs<F>(x), far = F(1) - F(2) / (exp<F>(size + size) + F(1));
    return size < F(0.625) ? tanh_near_zero(x, x * x) : x < 0 ? -far : far;
}

// The normal distribution: its density, and its distribution function from
//     Phi(-|x|) = exp(-x^2/2) g(t) / (1 + |x|/2),   t = (|x| - 4) / (|x| + 4) in [-1, 1],
// with the Chebyshev series of the smooth g (M. Shepherd and J. Laframboise, 1981) written in powers of t. Phi has a small
// relative error in the left tail too. For finite x.
template <class F>
struct Normal {
    Vec<F> density, distribution;
};
constexpr float kNormalTail32[] = {
    0.28323192265082038f,    -0.13355059537019042f,   0.069189536865949430f,   -0.021553637258859385f,
    -0.00066761291741531474f, 0.0047229457874740520f, -0.0022425638561958987f, 0.00017325085251034240f,
    0.00024393846186879611f, -6.4113635338221231e-5f, -1.9652258803150548e-5f, 7.7200129417000406e-6f};
constexpr double kNormalTail64[] = {
    0.28323192390590679609,    -0.13355059943749073927,   0.069189445031847923331,   -0.021553521642080272143,
    -0.00066651666104468906161, 0.0047220009983918107488, -0.0022474082551257392936, 0.00017659538229852003261,
    0.00025385639127904113637, -6.9992616040969785942e-5, -2.9602280813939156001e-5, 1.2941000935875733448e-5,
    4.6612054230545914431e-6,  -2.1313925799384213531e-6, -9.7477466263170482264e-7, 3.0636995069306104969e-7,
    2.2771388687846772609e-7,  -2.7041378026062766484e-8, -4.9871780616952993533e-8, -3.0032193433839021255e-9,
    8.4920924143614980078e-9,  1.7270090979331099687e-9,  -7.9665033605124065193e-10, -2.454385437375036202e-10};

inline Vec<float> normal_tail(Vec<float> t) { return polynomial(t, kNormalTail32); }
inline Vec<double> normal_tail(Vec<double> t) { return polynomial(t, kNormalTail64); }

template <class F>
inline Normal<F> normal(Vec<F> x) {
    const Vec<F> e = exp<F>(x * x * F(-0.5));
    const Vec<F> size = abs<F>(x);
    const Vec<F> tail = e * normal_tail((size - F(4)) / (size + F(4))) / (F(1) + F(0.5) * size);
    return {e * F(0.39894228040143268), x < 0 ? tail : F(1) - tail};
}

}  // namespace metakern::METAKERN_ISA
