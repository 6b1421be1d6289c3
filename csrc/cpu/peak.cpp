// The peak rate of the machine: multiply-adds in registers, in chains that do not depend on each other.
#include "../peak.h"

#include <cmath>

#include "../parallel.h"
#include "simd.h"

#if defined(__AVX512F__) && __has_include(<avx512bf16intrin.h>)
#include <immintrin.h>
#define METAKERN_BF16
#endif

namespace metakern::METAKERN_ISA {

namespace {

// Up to two multiply-adds begin in each cycle, and a result is ready after four to six cycles. So 12 chains hide the
// latency, and leave registers for the factor. AVX-512 has twice as many registers.
#if defined(__AVX512F__)
constexpr int kChains = 24;
#else
constexpr int kChains = 12;
#endif
constexpr std::int64_t kSteps = 1 << 16;  // of a unit of work: enough to make the cost of handing it out negligible

// Runs kChains chains of kSteps multiply-adds x = a x + a. They start at different values, and the compiler knows
// neither these nor who reads the sum, so it can leave nothing out. With a = 1/2 all values stay between 0 and 1.
template <class F>
inline void chains(F scale) {
    const Vec<F> a = splat(scale);
    Vec<F> x[kChains];
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) x[i] = a * (F(i) / kChains);
    for (std::int64_t k = 0; k < kSteps; ++k) {
#pragma GCC unroll 24
        for (int i = 0; i < kChains; ++i) x[i] = x[i] * a + a;
    }
    Vec<F> sum = x[0];
#pragma GCC unroll 24
    for (int i = 1; i < kChains; ++i) sum += x[i];
    volatile F used = sum[0];
    static_cast<void>(used);
}

// Returns the FLOP of enough units of work for `flop`, each of kChains * kSteps steps of `per_step` FLOP.
template <class Unit>
inline double spread(double flop, double per_step, int threads, Unit unit) {
    const double each = per_step * kChains * kSteps, units = std::ceil(flop / each);
    parallel_for(static_cast<std::int64_t>(units), threads, [&](std::int64_t) { unit(); });
    return units * each;
}

template <class F>
double multiply_adds(double flop, int threads) {
    volatile F unknown = F(0.5);
    const F half = unknown;
    return spread(flop, 2 * kLanes<F>, threads, [half] { chains(half); });
}

#ifdef METAKERN_BF16
#define METAKERN_TARGET __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

// The same chains of x = x + a a, where a holds pairs of bfloat16: two products are added to each float32 lane.
METAKERN_TARGET void dot_products(float small) {
    const __m512bh a = _mm512_cvtne2ps_pbh(_mm512_set1_ps(small), _mm512_set1_ps(small));
    __m512 x[kChains];
#pragma GCC unroll 24
    for (int i = 0; i < kChains; ++i) x[i] = _mm512_set1_ps(small * static_cast<float>(i));
    for (std::int64_t k = 0; k < kSteps; ++k) {
#pragma GCC unroll 24
        for (int i = 0; i < kChains; ++i) x[i] = _mm512_dpbf16_ps(x[i], a, a);
    }
    __m512 sum = x[0];
#pragma GCC unroll 24
    for (int i = 1; i < kChains; ++i) sum = _mm512_add_ps(sum, x[i]);
    volatile float used = _mm512_cvtss_f32(sum);
    static_cast<void>(used);
}

double bfloat16_dot_products(double flop, int threads) {
    volatile float unknown = 1.0f / 1024;
    const float small = unknown;
    return spread(flop, 4 * kLanes<float>, threads, [small] { dot_products(small); });
}
#else
constexpr double (*bfloat16_dot_products)(double, int) = nullptr;
#endif

}  // namespace

extern const PeakKernels peak_kernels = {{multiply_adds<float>, multiply_adds<double>, bfloat16_dot_products}};

}  // namespace metakern::METAKERN_ISA
