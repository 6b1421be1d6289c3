// Vectors as wide as the registers of the instruction set that is compiled for, and the functions of them that kernels
// need. Written with the vector types of GCC and Clang, so that one text serves SSE2, AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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
inline void store(F* p, Vec<F> v) {
    std::memcpy(p, &v, sizeof v);
}
#if defined(__AVX512F__)
inline __mmask16 tail_mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Vec<float> load(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(tail_mask(n), p); }
inline Vec<double> load(const double* p, int64_t n) {
    return _mm512_maskz_loadu_pd(static_cast<__mmask8>(tail_mask(n)), p);
}
inline void store(float* p, Vec<float> v, int64_t n) { _mm512_mask_storeu_ps(p, tail_mask(n), v); }
inline void store(double* p, Vec<double> v, int64_t n) {
    _mm512_mask_storeu_pd(p, static_cast<__mmask8>(tail_mask(n)), v);
}
#elif defined(__AVX2__)
inline __m256i tail_mask(const float*, int64_t n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i tail_mask(const double*, int64_t n) {
    return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}
inline Vec<float> load(const float* p, int64_t n) { return _mm256_maskload_ps(p, tail_mask(p, n)); }
inline Vec<double> load(const double* p, int64_t n) { return _mm256_maskload_pd(p, tail_mask(p, n)); }
inline void store(float* p, Vec<float> v, int64_t n) { _mm256_maskstore_ps(p, tail_mask(p, n), v); }
inline void store(double* p, Vec<double> v, int64_t n) { _mm256_maskstore_pd(p, tail_mask(p, n), v); }
#else
template <class F>
inline Vec<F> load(const F* p, int64_t n) {
    Vec<F> v{};
    std::memcpy(&v, p, static_cast<std::size_t>(n) * sizeof(F));
    return v;
}
template <class F>
inline void store(F* p, Vec<F> v, int64_t n) {
    std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(F));
}
#endif

// x in all lanes. `Vec<F>{} + x` would be computed: it is not x where x is -0.
template <class F>
inline Vec<F> splat(F x) {
    return x - Vec<F>{};
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
    x = x < low ? splat(low) : x;
    return x > high ? splat(high) : x;
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
    const Bits<F> biased = (Bits<F>)shifted - (Bits<F>)splat<F>(E::round) + 2 * E::bias;
    const Bits<F> half = biased >> 1;
    return polynomial(r, E::taylor) * (Vec<F>)(half << E::mantissa) * (Vec<F>)((biased - half) << E::mantissa);
}

// exp(x) - 1 with a small relative error: for |x| < 1 by the Taylor polynomial of expm1(r), with r as in exp.
template <class F>
inline Vec<F> expm1(Vec<F> x) {
    using E = Exp<F>;
    constexpr F one_over_factorial[] = {1,          1 / F(2),      1 / F(6),       1 / F(24),       1 / F(120),       1 / F(720),
                                        1 / F(5040), 1 / F(40320), 1 / F(362880), 1 / F(3628800), 1 / F(39916800), 1 / F(479001600),
                                        1 / F(6227020800)};
    const Vec<F> limited = clamp<F>(x, -1, 1);
    const Vec<F> k = (limited * F(1.4426950408889634) + E::round) - E::round;
    const Vec<F> r = (limited - k * E::ln2_high) - k * E::ln2_low;
    const Vec<F> scale = k > 0 ? splat(F(2)) : k < 0 ? splat(F(0.5)) : splat(F(1));
    const Vec<F> small = scale * (r * polynomial(r, one_over_factorial)) + (scale - F(1));
    return ((x < F(-1)) | (x > F(1))) ? exp<F>(x) - F(1) : x == 0 ? x : small;  // -0 stays -0
}

// log(u) + c / u for u = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)], as in Sun's fdlibm: with s = f / (2 + f),
// log(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)). The correction c / u is small.
template <class F>
struct Log;
template <>
struct Log<float> {
    static constexpr float terms[] = {0xaaaaaa.0p-24f, 0xccce13.0p-25f, 0x91e9ee.0p-25f, 0xf89e26.0p-26f};
    static constexpr float least = 0x1p-126f, up = 0x1p25f;
    static constexpr int up_bits = 25;
    static constexpr std::uint32_t root_half = 0x3f3504f3;
};
template <>
struct Log<double> {
    static constexpr double terms[] = {6.666666666666735130e-01, 3.999999999940941908e-01, 2.857142874366239149e-01,
                                       2.222219843214978396e-01, 1.818357216161805012e-01, 1.531383769920937332e-01,
                                       1.479819860511658591e-01};
    static constexpr double least = 0x1p-1022, up = 0x1p54;
    static constexpr int up_bits = 54;
    static constexpr std::uint64_t root_half = 0x3fe6a09e667f3bcd;
};
template <class F>
inline Vec<F> log_near(Vec<F> u, Vec<F> c) {
    using E = Exp<F>;
    using L = Log<F>;
    const auto subnormal = u < L::least;
    const Vec<F> scaled = subnormal ? u * L::up : u;
    const Bits<F> above = (Bits<F>)scaled - L::root_half;  // its exponent is k, modulo the width of a number
    const Bits<F> bits = (above & (((Bits<F>{} + 1) << E::mantissa) - 1)) + L::root_half;
    // k as a number: the exponent, made positive, in the last bits of a large number.
    const Bits<F> k_bits = ((above >> E::mantissa) + 2 * (E::bias + 1)) & (4 * E::bias + 3);
    const Vec<F> shifted = (Vec<F>)(k_bits + (Bits<F>)splat<F>(E::round)) - E::round - F(2 * (E::bias + 1));
    const Vec<F> k = subnormal ? shifted - F(L::up_bits) : shifted;
    const Vec<F> f = (Vec<F>)bits - F(1), s = f / (F(2) + f), z = s * s, half = F(0.5) * f * f;
    const Vec<F> y = k * E::ln2_high - ((half - (s * (half + z * polynomial(z, L::terms)) + (k * E::ln2_low + c / u))) - f);
    const Vec<F> infinite = splat(F(__builtin_inf()));
    return u == 0 ? -infinite : u < 0 ? splat(F(__builtin_nan(""))) : ((u == infinite) | (u != u)) ? u : y;
}
template <class F>
inline Vec<F> log(Vec<F> x) {
    return log_near<F>(x, Vec<F>{});
}
// log(1 + x), with the part of x that 1 + x loses as the correction.
template <class F>
inline Vec<F> log1p(Vec<F> x) {
    const Vec<F> u = F(1) + x, lost = x < F(1) ? x - (u - F(1)) : F(1) - (u - x);
    return x == 0 ? x : log_near<F>(u, u == u + u ? Vec<F>{} : lost);
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

// erf by a rational function near zero, which keeps the relative error small (S. Moshier, Cephes), and by Phi beyond.
template <class F>
inline Vec<F> erf(Vec<F> x) {
    constexpr F p[] = {F(5.55923013010394962768e4), F(7.00332514112805075473e3), F(2.23200534594684319226e3),
                       F(9.00260197203842689217e1), F(9.60497373987051638749)};
    constexpr F q[] = {F(4.92673942608635921086e4), F(2.26290000613890934246e4), F(4.59432382970980127987e3),
                       F(5.21357949780152679795e2), F(3.35617141647503099647e1), F(1)};
    const Vec<F> square = x * x, near = x * (polynomial(square, p) / polynomial(square, q));
    const Vec<F> tail = F(2) * normal<F>(clamp<F>(abs<F>(x), 0, 10) * F(-1.4142135623730951)).distribution;
    const Vec<F> far = F(1) - tail;
    return abs<F>(x) < F(1) ? near : x < 0 ? -far : x > 0 ? far : x;
}

}  // namespace metakern::METAKERN_ISA
