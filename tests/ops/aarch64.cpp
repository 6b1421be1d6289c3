// Checks the products of the instruction set in use against sums in double, and its elementwise instructions against
// formulas in long double, and prints how many numbers were checked. test_aarch64.py compiles it for aarch64 and runs it in
// an emulator, where there is no PyTorch.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>

#include "../../csrc/isa.h"

using namespace metakern;
using std::int64_t;
using Real = long double;

namespace {

int checks = 0;

template <class... Values>
void check(bool holds, const char* what, Values... values) {
    ++checks;
    if (holds) return;
    std::printf(what, values...);
    std::printf("\n");
    std::exit(1);
}

template <class F>
std::vector<F> draw(int64_t size, unsigned seed, F scale = 1) {
    std::mt19937 generator(seed);
    std::normal_distribution<double> normal;
    std::vector<F> x(static_cast<std::size_t>(size));
    for (F& element : x) element = scale * static_cast<F>(normal(generator));
    return x;
}

template <class F>
bool same(const F* a, const F* b, int64_t count) {
    return !std::memcmp(a, b, static_cast<std::size_t>(count) * sizeof(F));
}

// c = add + scale a b, for a and b with contiguous rows or columns, and `add` absent (0), full (1), or one row for all
// rows (2). The error is at most 2 (K + 4) roundings of the sum of absolute values, half of them the reference's. A row is the same computed alone, and
// so is the result with three threads, bit for bit.
template <class F>
void product(int64_t T, int64_t M, int64_t N, int64_t K, bool a_by_row, bool b_by_row, int adds) {
    const auto a = draw<F>(T * M * K, 1), b = draw<F>(T * K * N, 2), add = draw<F>(T * M * N, 3);
    std::vector<F> c(static_cast<std::size_t>(T * M * N)), alone = c;
    Product p{a.data(), b.data(), adds ? add.data() : nullptr, c.data(), T, M, N, K, {M * K, K, 1}, {K * N, N, 1}, {M * N, adds == 1 ? N : 0}, 0.7, false};
    if (!a_by_row) p.a_strides[1] = 1, p.a_strides[2] = M;
    if (!b_by_row) p.b_strides[1] = 1, p.b_strides[2] = K;
    const auto run = isa_in_use().product.run[sizeof(F) == 8];
    run(p, 1);
    const auto at = [](int64_t i) { return static_cast<std::size_t>(i); };
    for (int64_t t = 0; t < T; ++t)
        for (int64_t i = 0; i < M; ++i)
            for (int64_t j = 0; j < N; ++j) {
                const double first = adds ? add[at(t * M * N + i * p.add_strides[1] + j)] : 0, scale = static_cast<F>(0.7);
                double sum = 0, size = 0;
                for (int64_t k = 0; k < K; ++k) {
                    const double term = double(a[at(t * M * K + i * p.a_strides[1] + k * p.a_strides[2])]) *
                                        b[at(t * K * N + k * p.b_strides[1] + j * p.b_strides[2])];
                    sum += term;
                    size += std::fabs(term);
                }
                const double error = std::fabs(first + scale * sum - c[at((t * M + i) * N + j)]);
                check(error <= 2 * (K + 4) * std::numeric_limits<F>::epsilon() * (size + std::fabs(first)),
                      "product of %d bytes, T %d M %d N %d K %d: element %d %d is off by %g", int(sizeof(F)), int(T), int(M),
                      int(N), int(K), int(i), int(j), error);
            }
    p.c = alone.data();
    run(p, 3);
    check(same(c.data(), alone.data(), T * M * N), "product, M %d N %d K %d: threads change bits", int(M), int(N), int(K));
    if (T > 1) return;
    p.M = 1;
    for (int64_t i = 0; i < M; ++i) {
        p.a = a.data() + i * p.a_strides[1];
        p.add = adds ? add.data() + i * p.add_strides[1] : nullptr;
        p.c = alone.data() + i * N;
        run(p, 1);
    }
    check(same(c.data(), alone.data(), M * N), "product, M %d N %d K %d: a row alone has other bits", int(M), int(N), int(K));
}

template <class F>
void products() {
    for (int64_t M : {1, 2, 3, 4, 5, 6, 9, 23})
        for (int64_t N : {1, 3, 7, 8, 16, 31, 70})
            for (int64_t K : {0, 1, 6, 260})
                for (int layout = 0; layout < 12; ++layout) product<F>(1, M, N, K, layout & 1, layout & 2, layout / 4);
    for (int layout = 0; layout < 12; ++layout) product<F>(2, 210, 37, 20, layout & 1, layout & 2, layout / 4);
}

Real sigmoid(Real x) { return 1 / (1 + std::exp(-x)); }
Real density(Real x) { return std::exp(-x * x / 2) / std::sqrt(2 * std::acos(Real(-1))); }
Real distribution(Real x) { return std::erfc(-x / std::sqrt(Real(2))) / 2; }

// The instructions that are formulas of vectors, in long double, for the scalars s = 0.3 and t = -0.8.
struct Exact {
    InstructionName name;
    int inputs;
    Real (*of)(Real x, Real y, Real s, Real t);
};
constexpr Exact kExact[] = {
    {k_add, 2, [](Real x, Real y, Real s, Real) { return x + s * y; }},
    {k_mul, 2, [](Real x, Real y, Real, Real) { return x * y; }},
    {k_div, 2, [](Real x, Real y, Real, Real) { return x / y; }},
    {k_affine, 1, [](Real x, Real, Real s, Real t) { return s * x + t; }},
    {k_reciprocal, 1, [](Real x, Real, Real s, Real) { return s / x; }},
    {k_square, 1, [](Real x, Real, Real, Real) { return x * x; }},
    {k_exp, 1, [](Real x, Real, Real, Real) { return std::exp(x); }},
    {k_abs, 1, [](Real x, Real, Real, Real) { return std::fabs(x); }},
    {k_sign, 1, [](Real x, Real, Real, Real) { return Real(x > 0) - Real(x < 0); }},
    {k_maximum, 2, [](Real x, Real y, Real, Real) { return std::max(x, y); }},
    {k_minimum, 2, [](Real x, Real y, Real, Real) { return std::min(x, y); }},
    {k_relu, 1, [](Real x, Real, Real, Real) { return std::max(x, Real(0)); }},
    {k_threshold_backward, 2, [](Real x, Real y, Real s, Real) { return y <= s ? Real(0) : x; }},
    {k_tanh, 1, [](Real x, Real, Real, Real) { return std::tanh(x); }},
    {k_tanh_backward, 2, [](Real x, Real y, Real, Real) { return x * (1 - y * y); }},
    {k_sigmoid, 1, [](Real x, Real, Real, Real) { return sigmoid(x); }},
    {k_sigmoid_backward, 2, [](Real x, Real y, Real, Real) { return x * y * (1 - y); }},
    {k_gelu, 1, [](Real x, Real, Real, Real) { return x * distribution(x); }},
    {k_gelu_backward, 2, [](Real x, Real y, Real, Real) { return x * (distribution(y) + y * density(y)); }},
    {k_silu, 1, [](Real x, Real, Real, Real) { return x * sigmoid(x); }},
    {k_silu_backward, 2, [](Real x, Real y, Real, Real) { return x * sigmoid(y) * (1 + y * sigmoid(-y)); }},
};

// Each for rows of 1 to 19 elements that are contiguous, have gaps, or repeat one element.
template <class F>
void instructions() {
    for (const Exact& exact : kExact)
        for (int64_t count = 1; count < 20; ++count)
            for (int64_t stride : {1, 2, 0}) {
                constexpr int64_t rows = 3;
                const int64_t gap = count * std::max<int64_t>(stride, 1);
                const auto x = draw<F>(rows * gap, 4, 3), y = draw<F>(rows * gap, 5, 3);
                std::vector<F> out(static_cast<std::size_t>(rows * count));
                const F s = F(0.3), t = F(-0.8);
                const Instruction p{2, 0, {rows, count}, {{count, 1}, {gap, stride}, {gap, stride}},
                                    {out.data(), const_cast<F*>(x.data()), const_cast<F*>(y.data())}, {s, t}};
                isa_in_use().instructions.run[exact.name][sizeof(F) == 8 ? kFloat64 : kFloat32](p);
                for (int64_t i = 0; i < rows * count; ++i) {
                    const auto from = static_cast<std::size_t>(i / count * gap + i % count * stride);
                    const Real right = exact.of(x[from], y[from], s, t), got = out[static_cast<std::size_t>(i)];
                    // relative to the result and, where terms cancel, to the operands
                    const Real size = std::fabs(right) + std::fabs(Real(x[from])) * (1 + std::fabs(Real(y[from])));
                    check(std::fabs(right - got) <= 16 * std::numeric_limits<F>::epsilon() * size,
                          "instruction %d of %d bytes: f(%g, %g) is off by %g", int(exact.name), int(sizeof(F)),
                          double(x[from]), double(y[from]), double(right - got));
                }
            }
}

}  // namespace

int main() {
    products<float>();
    products<double>();
    instructions<float>();
    instructions<double>();
    std::printf("%s: %d checks\n", isa_in_use().name.c_str(), checks);
}
