// The recurrent cells: the four rules of one step, for one hidden unit of one sequence.
//
// V is a SIMD vector on a CPU, with a hidden unit in each lane, or one number of a GPU's thread; F is the type of its
// elements. The file that includes this one defines sigmoid(V), tanh(V) and positive(V). With u = x W_ihᵀ + b_ih and
// p = h_{t-1} W_hhᵀ + b_hh, u[g] and p[g] belong to gate g; s[0] is h, s[1] is c of an LSTM. The derivations are in
// metakern/ops/<cell>/__init__.py.
//
//     forward   turns s into the state after the step, from u and p; and writes what is kept for the other rules
//     jvp       turns t_s into that after the step, from t_u and t_p; and writes t_kept
//     total     adds to the cotangent of c_t the path through h_t
//     vjp       from a total ct: ct_a and ct_u, the cotangents of p and u, and ct_s, the part of the cotangent of the
//               state before the step that does not pass through the product with W_hh
//     vjp_jvp   the tangents of `total` and `vjp` together
#pragma once

#ifdef __CUDACC__
#define METAKERN_INLINE __device__ __forceinline__
#else
#define METAKERN_INLINE inline __attribute__((always_inline))
#endif

// kGates: rows of W for each hidden unit. kKept: numbers that a step keeps for each unit. kStates: numbers that a unit
// carries from step to step. kSplit: whether ct_u differs from ct_a.
template <class F>
struct Lstm {
    static constexpr int kGates = 4, kKept = 4, kStates = 2;
    static constexpr bool kSplit = false;

    template <class V>
    METAKERN_INLINE static void forward(const V* u, const V* p, V* s, V* kept) {
        const V i = sigmoid(u[0] + p[0]), f = sigmoid(u[1] + p[1]), g = tanh(u[2] + p[2]), o = sigmoid(u[3] + p[3]);
        s[1] = f * s[1] + i * g;
        s[0] = o * tanh(s[1]);
        kept[0] = i, kept[1] = f, kept[2] = g, kept[3] = o;
    }

    template <class V>
    METAKERN_INLINE static void jvp(const V* kept, const V* s, const V* t_u, const V* t_p, V* t_s, V* t_kept) {
        const V i = kept[0], f = kept[1], g = kept[2], o = kept[3], e = tanh(f * s[1] + i * g);
        const V t_i = i * (F(1) - i) * (t_u[0] + t_p[0]), t_f = f * (F(1) - f) * (t_u[1] + t_p[1]);
        const V t_g = (F(1) - g * g) * (t_u[2] + t_p[2]), t_o = o * (F(1) - o) * (t_u[3] + t_p[3]);
        t_s[1] = f * t_s[1] + t_f * s[1] + t_i * g + i * t_g;
        t_s[0] = t_o * e + o * (F(1) - e * e) * t_s[1];
        t_kept[0] = t_i, t_kept[1] = t_f, t_kept[2] = t_g, t_kept[3] = t_o;
    }

    template <class V>
    METAKERN_INLINE static void total(const V* kept, const V* s, V* ct) {
        const V e = tanh(kept[1] * s[1] + kept[0] * kept[2]);
        ct[1] += kept[3] * (F(1) - e * e) * ct[0];
    }

    template <class V>
    METAKERN_INLINE static void vjp(const V* kept, const V* s, const V* ct, V* ct_a, V*, V* ct_s) {
        const V i = kept[0], f = kept[1], g = kept[2], o = kept[3], e = tanh(f * s[1] + i * g);
        ct_a[0] = ct[1] * g * i * (F(1) - i);
        ct_a[1] = ct[1] * s[1] * f * (F(1) - f);
        ct_a[2] = ct[1] * i * (F(1) - g * g);
        ct_a[3] = ct[0] * e * o * (F(1) - o);
        ct_s[0] = V{};
        ct_s[1] = f * ct[1];
    }

    template <class V>
    METAKERN_INLINE static void vjp_jvp(const V* kept, const V* s, const V* t_kept, const V* t_s, const V* ct, V* t_ct,
                                        V* t_ct_a, V*, V* t_ct_s) {
        const V i = kept[0], f = kept[1], g = kept[2], o = kept[3], e = tanh(f * s[1] + i * g);
        const V t_i = t_kept[0], t_f = t_kept[1], t_g = t_kept[2], t_o = t_kept[3];
        const V slope = F(1) - e * e, t_e = slope * (f * t_s[1] + t_f * s[1] + t_i * g + i * t_g);
        t_ct[1] += (t_o * slope - F(2) * o * e * t_e) * ct[0] + o * slope * t_ct[0];
        t_ct_a[0] = (t_ct[1] * g + ct[1] * t_g) * i * (F(1) - i) + ct[1] * g * (F(1) - F(2) * i) * t_i;
        t_ct_a[1] = (t_ct[1] * s[1] + ct[1] * t_s[1]) * f * (F(1) - f) + ct[1] * s[1] * (F(1) - F(2) * f) * t_f;
        t_ct_a[2] = (t_ct[1] * i + ct[1] * t_i) * (F(1) - g * g) - F(2) * ct[1] * i * g * t_g;
        t_ct_a[3] = (t_ct[0] * e + ct[0] * t_e) * o * (F(1) - o) + ct[0] * e * (F(1) - F(2) * o) * t_o;
        t_ct_s[0] = V{};
        t_ct_s[1] = f * t_ct[1] + t_f * ct[1];
    }
};

template <class F>
struct Gru {
    static constexpr int kGates = 3, kKept = 4, kStates = 1;
    static constexpr bool kSplit = true;

    template <class V>
    METAKERN_INLINE static void forward(const V* u, const V* p, V* s, V* kept) {
        const V r = sigmoid(u[0] + p[0]), z = sigmoid(u[1] + p[1]), n = tanh(u[2] + r * p[2]);
        s[0] = n + z * (s[0] - n);
        kept[0] = r, kept[1] = z, kept[2] = n, kept[3] = p[2];
    }

    template <class V>
    METAKERN_INLINE static void jvp(const V* kept, const V* s, const V* t_u, const V* t_p, V* t_s, V* t_kept) {
        const V r = kept[0], z = kept[1], n = kept[2], p = kept[3];
        const V t_r = r * (F(1) - r) * (t_u[0] + t_p[0]), t_z = z * (F(1) - z) * (t_u[1] + t_p[1]);
        const V t_n = (F(1) - n * n) * (t_u[2] + r * t_p[2] + t_r * p);
        t_s[0] = t_n + z * (t_s[0] - t_n) + t_z * (s[0] - n);
        t_kept[0] = t_r, t_kept[1] = t_z, t_kept[2] = t_n, t_kept[3] = t_p[2];
    }

    template <class V>
    METAKERN_INLINE static void total(const V*, const V*, V*) {}

    template <class V>
    METAKERN_INLINE static void vjp(const V* kept, const V* s, const V* ct, V* ct_a, V* ct_u, V* ct_s) {
        const V r = kept[0], z = kept[1], n = kept[2], p = kept[3];
        const V m = (F(1) - z) * (F(1) - n * n) * ct[0];
        ct_u[0] = ct_a[0] = m * p * r * (F(1) - r);
        ct_u[1] = ct_a[1] = ct[0] * (s[0] - n) * z * (F(1) - z);
        ct_u[2] = m;
        ct_a[2] = m * r;
        ct_s[0] = z * ct[0];
    }

    template <class V>
    METAKERN_INLINE static void vjp_jvp(const V* kept, const V* s, const V* t_kept, const V* t_s, const V* ct, V* t_ct,
                                        V* t_ct_a, V* t_ct_u, V* t_ct_s) {
        const V r = kept[0], z = kept[1], n = kept[2], p = kept[3];
        const V t_r = t_kept[0], t_z = t_kept[1], t_n = t_kept[2], t_p = t_kept[3];
        const V k = (F(1) - z) * (F(1) - n * n), t_k = -t_z * (F(1) - n * n) - F(2) * (F(1) - z) * n * t_n;
        const V m = k * ct[0], t_m = t_k * ct[0] + k * t_ct[0];
        t_ct_u[0] = t_ct_a[0] = (t_m * p + m * t_p) * r * (F(1) - r) + m * p * (F(1) - F(2) * r) * t_r;
        t_ct_u[1] = t_ct_a[1] = ((t_s[0] - t_n) * ct[0] + (s[0] - n) * t_ct[0]) * z * (F(1) - z) +
                                (s[0] - n) * ct[0] * (F(1) - F(2) * z) * t_z;
        t_ct_u[2] = t_m;
        t_ct_a[2] = t_m * r + m * t_r;
        t_ct_s[0] = t_z * ct[0] + z * t_ct[0];
    }
};

// What Elman's layer keeps of a step is h itself.
template <class F, bool relu>
struct Rnn {
    static constexpr int kGates = 1, kKept = 1, kStates = 1;
    static constexpr bool kSplit = false;

    template <class V>
    METAKERN_INLINE static V slope(V h) {
        return relu ? positive(h) : F(1) - h * h;
    }

    template <class V>
    METAKERN_INLINE static void forward(const V* u, const V* p, V* s, V* kept) {
        const V z = u[0] + p[0];
        kept[0] = s[0] = relu ? (z < F(0) ? V{} : z) : tanh(z);
    }

    template <class V>
    METAKERN_INLINE static void jvp(const V* kept, const V*, const V* t_u, const V* t_p, V* t_s, V* t_kept) {
        t_kept[0] = t_s[0] = slope(kept[0]) * (t_u[0] + t_p[0]);
    }

    template <class V>
    METAKERN_INLINE static void total(const V*, const V*, V*) {}

    template <class V>
    METAKERN_INLINE static void vjp(const V* kept, const V*, const V* ct, V* ct_a, V*, V* ct_s) {
        ct_a[0] = slope(kept[0]) * ct[0];
        ct_s[0] = V{};
    }

    template <class V>
    METAKERN_INLINE static void vjp_jvp(const V* kept, const V*, const V* t_kept, const V*, const V* ct, V* t_ct,
                                        V* t_ct_a, V*, V* t_ct_s) {
        t_ct_a[0] = slope(kept[0]) * t_ct[0];
        if (!relu) t_ct_a[0] -= F(2) * kept[0] * t_kept[0] * ct[0];
        t_ct_s[0] = V{};
    }
};
