// Rotary position embedding of the halves (a, b) of a row: y = (a cos_a - b sin_a, b cos_b + a sin_b), and its transpose.
#include "rows.h"

namespace metakern::METAKERN_ISA {

// Rows x [B, H, L, D] with the cosines and sines [B, L, D] of their positions.
template <class F, bool transposed>
void rope(const Args& args) {
    const F *x = args.tensor<F>(0), *cosine = args.tensor<F>(1), *sine = args.tensor<F>(2);
    F* y = args.tensor<F>(3);
    const int64_t B = args.sizes[0], H = args.sizes[1], L = args.sizes[2], D = args.sizes[3], half = D / 2;
    Blocks(B, H * L, D, args.threads).run([=](int64_t t, int64_t, int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
            const F *a = x + r * D, *cos = cosine + (t * L + r % L) * D, *sin = sine + (t * L + r % L) * D;
            F* out = y + r * D;
            each<F>(half, [=](int64_t i, auto... n) {
                const Vec<F> a_i = load(a + i, n...), b_i = load(a + half + i, n...);
                const Vec<F> sin_a = load(sin + i, n...), sin_b = load(sin + half + i, n...);
                const Vec<F> from_b = transposed ? b_i * sin_b : -b_i * sin_a;
                const Vec<F> from_a = transposed ? -a_i * sin_a : a_i * sin_b;
                store(out + i, a_i * load(cos + i, n...) + from_b, n...);
                store(out + half + i, b_i * load(cos + half + i, n...) + from_a, n...);
            });
        }
    });
}

extern const Kernel rope_kernels[] = {
    {"rope_forward", "x:BHLD cos:BLD sin:BLD -> y:BHLD", 0, {rope<float, false>, rope<double, false>}},
    {"rope_vjp", "ct_y:BHLD cos:BLD sin:BLD -> ct_x:BHLD", 0, {rope<float, true>, rope<double, true>}},
    {}};

}  // namespace metakern::METAKERN_ISA
