// The products of a recurrence, for a dtype: how a block's workers share one, and where each number of W lies for them.
#pragma once

#include <common.cuh>

#include "../plan.h"

namespace metakern::cuda {

// A worker's piece of a product: kColumns columns for up to kRows rows, kDepth numbers of each at a time, from kVectors
// vectors of W for each of its kLanes threads, and kLeft vectors of a row of the left operand. Few: rows that are enough
// for small batches.
template <class E>
struct Tile;

// float32: a worker is a thread; vector q of an iteration holds row q of a 4 x 4 piece of W.
template <>
struct Tile<float> {
    static constexpr int kRows = 8, kFew = 2, kColumns = 4, kDepth = 4, kVectors = 4, kLanes = 1, kLeft = 1, kGranule = 4;
    // The columns of W in a vector, and the numbers of each.
    static constexpr int kWide = 4, kDeep = 1;

    // The vector with columns kWide c ..., numbers kDeep k ... of the slice, among those of the slice.
    __device__ static std::int64_t place(int c, int k, const Plan& plan) {
        const int split = k / 4 % plan.splits, iteration = k / 4 / plan.splits;
        return (std::int64_t{iteration} * 4 + k % 4) * plan.crew + split * plan.columns + c;
    }
    __device__ static int column(int c, int i) { return 4 * c + i; }

    template <int R>
    struct Sum {
        float value[R][4] = {};

        __device__ void add(const uint4* w, int next, const uint4* left, int pitch) {
            float b[4][4];
#pragma unroll
            for (int q = 0; q < 4; ++q) {
                const uint4 v = w[q * next];
                b[q][0] = __uint_as_float(v.x), b[q][1] = __uint_as_float(v.y);
                b[q][2] = __uint_as_float(v.z), b[q][3] = __uint_as_float(v.w);
            }
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const uint4 v = left[r * pitch];
                const float a[4] = {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
#pragma unroll
                for (int q = 0; q < 4; ++q)
#pragma unroll
                    for (int c = 0; c < 4; ++c) value[r][c] += a[q] * b[q][c];
            }
        }
        __device__ void store(float* sums, int spread, bool more) const {
#pragma unroll
            for (int r = 0; r < R; ++r) {
                float4* to = reinterpret_cast<float4*>(sums + r * spread);
                float4 v = more ? *to : float4{};
                v.x += value[r][0], v.y += value[r][1], v.z += value[r][2], v.w += value[r][3];
                *to = v;
            }
        }
    };
};

// bf16: a worker is a warp, W the left side of its tensor cores' products [16, 16] [16, 8]: the 8 are sequences. The order
// of the 32 numbers of an iteration is such that a lane's share of a row of the left operand, for both products, is one
// vector: lane % 4 has numbers 8 (lane % 4) ..., the first four of them in the first product.
template <>
struct Tile<Bf16> {
    static constexpr int kRows = 16, kFew = 8, kColumns = 16, kDepth = 32, kVectors = 2, kLanes = 32, kLeft = 4, kGranule = 16;
    static constexpr int kWide = 2, kDeep = 4;

    __device__ static std::int64_t place(int c, int k, const Plan& plan) {
        const int split = k / 8 % plan.splits, iteration = k / 8 / plan.splits, product = k % 2, lane = c % 8 * 4 + k % 8 / 2;
        return ((std::int64_t{iteration} * 2 + product) * plan.crew + split * plan.columns + c / 8) * 32 + lane;
    }
    __device__ static int column(int c, int i) { return c / 8 * 16 + c % 8 + 8 * i; }

    template <int R>
    struct Sum {
        float value[R / 8][2][4] = {};

        __device__ void add(const uint4* w, int next, const uint4* left, int pitch) {
            const uint4 first = w[0], second = w[next];
            const int lane = threadIdx.x % 32;
#pragma unroll
            for (int r = 0; r < R / 8; ++r) {
                const uint4 b = left[(8 * r + lane / 4) * pitch + lane % 4];
                mma(value[r][0], first, b.x, b.y);
                mma(value[r][1], second, b.z, b.w);
            }
        }
        __device__ void store(float* sums, int spread, bool more) const {
            const int lane = threadIdx.x % 32;
#pragma unroll
            for (int r = 0; r < R / 8; ++r)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float* to = sums + (8 * r + lane % 4 * 2 + i % 2) * spread + lane / 4 + i / 2 * 8;
                    const float v = value[r][0][i] + value[r][1][i];
                    *to = more ? *to + v : v;
                }
        }
    };
};

template <class E>
constexpr TileShape tile_shape{Tile<E>::kRows, Tile<E>::kColumns, Tile<E>::kDepth, Tile<E>::kVectors,
                               Tile<E>::kLanes, Tile<E>::kLeft, Tile<E>::kGranule};

}  // namespace metakern::cuda
