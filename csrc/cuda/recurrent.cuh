// The four rules of recurrent cells over whole sequences on a GPU: what csrc/cpu/recurrent.h does, by groups of blocks.
//
// A group of blocks (plan.h) runs a task's sequences, kRows at a time. Each block owns some hidden units, multiplies the
// left operand of all of them with its slice of W, sums what its workers found, and applies the cell's formulas, a thread a
// unit of a sequence. What comes out is the next step's left operand: it goes to global memory, which is L2, where there is
// room for two of them, and the blocks of the group meet. Tensors are float32 or bf16; states and cotangents of states are
// carried from step to step in float32, and every sum is float32. A unit is summed in an order that depends on the plan
// alone: results do not depend on the other sequences.
//
// W is laid out beforehand (`prepare`) in the order in which the threads read it, 16 bytes each, without bank conflicts and
// without a thought for edges: beyond the last unit it is zero.
#pragma once

#include <common.cuh>

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>

#include "kernel.h"
#include "plan.h"

namespace metakern::cuda {

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
__device__ __forceinline__ float tanh(float x) { return tanhf(x); }
__device__ __forceinline__ float positive(float x) { return x > 0.0f ? 1.0f : 0.0f; }
#include "../cells.h"

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

// The sequences of a call: T tasks of B sequences of L steps with H hidden units; and the memory of the launch.
template <class E>
struct Sequences {
    std::int64_t T, B, L, H;
    const std::int64_t* lengths;  // [T, B], or null: all L
    bool reverse;
    Plan plan;
    uint4* weights;     // [T, blocks, iterations, vectors]
    uint4* exchange;    // [T, parts, 2, rows, depth]: left operands
    float* carry;       // [T, B, states, H]
    unsigned* counters; // [T, parts]

    __device__ bool active(std::int64_t row, std::int64_t l) const { return !lengths || l < lengths[row]; }
    __host__ __device__ std::int64_t slice() const { return std::int64_t{plan.iterations} * plan.vectors; }
    __host__ __device__ std::int64_t exchanged() const { return std::int64_t{plan.rows} * plan.depth; }
};

// Lays out W [T, G H, H] for all blocks, zeroes what the launch exchanges (its padding is read), and the counters.
template <class E>
__global__ void __launch_bounds__(kThreads, 1) prepare(const Sequences<E> q, const E* w, int gates, bool back) {
    const Plan& plan = q.plan;
    using Tile = Tile<E>;
    const std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x, step = std::int64_t{gridDim.x} * kThreads;
    const std::int64_t items = q.T * plan.parts, rows = gates * q.H;
    for (std::int64_t i = first; i < items; i += step) q.counters[i] = 0;
    for (std::int64_t i = first; i < items * 2 * q.exchanged(); i += step) q.exchange[i] = uint4{};
    const int across = plan.columns * Tile::kColumns / Tile::kWide, down = plan.iterations * plan.splits * Tile::kDepth / Tile::kDeep;
    for (std::int64_t i = first; i < q.T * plan.blocks * q.slice(); i += step) {
        const int inside = static_cast<int>(i % q.slice()), rank = static_cast<int>(i / q.slice() % plan.blocks);
        const std::int64_t t = i / q.slice() / plan.blocks;
        // Neighbors in memory are read by neighboring threads.
        const int c = back ? inside % across : inside / down, k = back ? inside / across : inside % down;
        union {
            E part[Tile::kWide * Tile::kDeep];
            uint4 whole;
        } vector;
        for (int x = 0; x < Tile::kWide * Tile::kDeep; ++x) {
            // What each of the four words of a fragment holds: two numbers of one column, then of the other; as mma has it.
            const int wide = Tile::kDeep == 1 ? x : x / 2 % 2, deep = Tile::kDeep == 1 ? 0 : x / 4 * 2 + x % 2;
            const int column = Tile::column(c, wide), unit = column % plan.units, gate = column / plan.units;
            const std::int64_t j = std::int64_t{rank} * plan.units + unit, n = std::int64_t{k} * Tile::kDeep + deep;
            const bool inside_w = j < q.H && gate < (back ? 1 : gates) && n < (back ? rows : q.H);
            vector.part[x] = inside_w ? w[(t * rows + (back ? n : gate * q.H + j)) * q.H + (back ? j : n)] : narrow<E>(0.0f);
        }
        q.weights[i - inside + Tile::place(c, k, plan)] = vector.whole;
    }
}

// sums [splits, rows, columns] of the product of R rows of a left operand, in global memory, with this block's slice of W.
template <class E, int R>
__device__ __forceinline__ void multiply(const Plan& plan, const uint4* from, const uint4* slice, const uint4* resident,
                                         uint4* left, float* sums) {
    using Tile = Tile<E>;
    const int piece = plan.splits * Tile::kLeft, lane = threadIdx.x % Tile::kLanes, next = plan.crew * Tile::kLanes;
    for (int begin = 0; begin < plan.iterations; begin += plan.chunk) {
        const int end = min(begin + plan.chunk, plan.iterations), width = (end - begin) * piece;
        for (int i = threadIdx.x; i < R * width; i += kThreads)
            left[i / width * plan.pitch + i % width] =
                load_written(from + std::int64_t{i / width} * plan.depth + begin * piece + i % width);
        __syncthreads();
        for (int worker = threadIdx.x / Tile::kLanes; worker < plan.crew; worker += kThreads / Tile::kLanes) {
            const int split = worker / plan.columns, column = worker % plan.columns, at = worker * Tile::kLanes + lane;
            const uint4* a = left + split * Tile::kLeft - begin * piece;
            typename Tile::template Sum<R> sum;
            int i = begin;
#pragma unroll 2
            for (; i < min(end, plan.resident); ++i) sum.add(resident + i * plan.vectors + at, next, a + i * piece, plan.pitch);
#pragma unroll 2
            for (; i < end; ++i)
                sum.add(slice + std::int64_t{i} * plan.vectors + at, next, a + i * piece, plan.pitch);
            sum.store(sums + split * Tile::kRows * plan.spread + column * Tile::kColumns, plan.spread, begin > 0);
        }
        __syncthreads();
    }
}

// Runs a rule over time. Of a unit of a sequence: rule.begin(row, j, s), rule.step(row, at, j, p, s, left) or, beyond the
// sequence's end, rule.skip(at, j, p, s, left), and rule.end(row, j, s), where s is what is carried, p what the product gave.
template <class Rule>
__global__ void __launch_bounds__(kThreads, 1) recur(const Sequences<typename Rule::Element> q, const Rule rule) {
    using E = typename Rule::Element;
    using Tile = Tile<E>;
    constexpr int S = Rule::kStates, kFrom = Rule::kFrom, kTo = Rule::kTo;
    const Plan& plan = q.plan;
    const int rank = blockIdx.x % plan.blocks;
    uint4 *const resident = shared_memory(), *const left = resident + plan.resident * plan.vectors;
    float* const sums = reinterpret_cast<float*>(left + Tile::kRows * plan.pitch);
    const std::int64_t first_unit = std::int64_t{rank} * plan.units;

    for (std::int64_t item = blockIdx.x / plan.blocks; item < q.T * plan.parts; item += plan.groups) {
        const std::int64_t task = item / plan.parts, begin = item % plan.parts * plan.rows;
        const std::int64_t first = task * q.B + begin, rows = min(std::int64_t{plan.rows}, q.B - begin);
        const uint4* slice = q.weights + (task * plan.blocks + rank) * q.slice();
        uint4* const exchange = q.exchange + item * 2 * q.exchanged();
        unsigned met = 0;
        const auto meet = [&] {
            if (plan.meeting == Meeting::cluster)
                meet_cluster();
            else if (plan.meeting == Meeting::counter)
                meet_blocks(q.counters + item, met += plan.blocks);
            else
                __syncthreads();
        };
        // body(row of the tile, row of all, unit, carried) for this block's units of the rows of a tile.
        const auto each = [&](std::int64_t tile, auto body) {
            const int count = static_cast<int>(min(rows - tile, std::int64_t{Tile::kRows})) * plan.units;
            for (int i = threadIdx.x; i < count; i += kThreads) {
                const int r = i / plan.units;
                const std::int64_t row = first + tile + r, j = first_unit + i % plan.units;
                if (j < q.H) body(r, row, j, q.carry + row * S * q.H + j);
            }
        };
        const auto product = [&](std::int64_t tile, int buffer) {
            const uint4* from = exchange + buffer * q.exchanged() + tile * plan.depth;
            meet_warp();
            if (rows - tile <= Tile::kFew)
                multiply<E, Tile::kFew>(plan, from, slice, resident, left, sums);
            else
                multiply<E, Tile::kRows>(plan, from, slice, resident, left, sums);
        };
        const auto summed = [&](int r, std::int64_t j, float* p) {
            const float* at = sums + r * plan.spread + (j - first_unit);
            for (int g = 0; g < kTo; ++g) p[g] = 0;
            for (int s = 0; s < plan.splits; ++s, at += Tile::kRows * plan.spread)
                for (int g = 0; g < kTo; ++g) p[g] += at[g * plan.units];
        };
        const auto hand_on = [&](int buffer, std::int64_t row, std::int64_t j, const float* values) {
            E* to = reinterpret_cast<E*>(exchange + buffer * q.exchanged() + (row - first) * plan.depth);
            for (int i = 0; i < kFrom; ++i) to[i * q.H + j] = narrow<E>(values[i]);
        };

        for (int i = threadIdx.x; i < plan.resident * plan.vectors; i += kThreads) resident[i] = slice[i];
        for (std::int64_t tile = 0; tile < rows; tile += Tile::kRows)
            each(tile, [&](int, std::int64_t row, std::int64_t j, float* carried) {
                float s[S];
                rule.begin(row, j, s);
                for (int i = 0; i < S; ++i) carried[i * q.H] = s[i];
                if (!Rule::kBack) hand_on(0, row, j, s);
            });
        if (!Rule::kBack) meet();
        for (std::int64_t step = 0; step < q.L; ++step) {
            const std::int64_t l = q.reverse != Rule::kBack ? q.L - 1 - step : step;
            const std::int64_t next = l + (q.reverse != Rule::kBack ? -1 : 1);
            const int buffer = step % 2;
            for (std::int64_t tile = 0; tile < rows; tile += Tile::kRows) {
                const bool multiplied = step || !Rule::kBack;
                if (multiplied) product(tile, buffer);
                each(tile, [&](int r, std::int64_t row, std::int64_t j, float* carried) {
                    float p[kTo] = {}, s[S], out[kFrom];
                    for (int i = 0; i < S; ++i) s[i] = carried[i * q.H];
                    if (step + 1 < q.L) rule.prefetch(row * q.L + next, j);
                    if (multiplied) summed(r, j, p);
                    if (q.active(row, l))
                        rule.step(row, row * q.L + l, j, p, s, out);
                    else
                        rule.skip(row * q.L + l, j, p, s, out);
                    for (int i = 0; i < S; ++i) carried[i * q.H] = s[i];
                    hand_on(1 - buffer, row, j, out);
                });
            }
            meet();
        }
        for (std::int64_t tile = 0; tile < rows; tile += Tile::kRows) {
            const bool multiplied = Rule::kBack && q.L;
            if (multiplied) product(tile, q.L % 2);
            each(tile, [&](int r, std::int64_t row, std::int64_t j, float* carried) {
                float p[kTo] = {}, s[S];
                for (int i = 0; i < S; ++i) s[i] = carried[i * q.H];
                if (multiplied) summed(r, j, p), s[0] += p[0];
                rule.end(row, j, s);
            });
        }
    }
}

// A rule that has no recurrence: rule.step(at, j) for all tokens and units.
template <class Rule>
__global__ void __launch_bounds__(kThreads, 1) apply(std::int64_t tokens, std::int64_t H, const Rule rule) {
    const std::int64_t first = std::int64_t{blockIdx.x} * kThreads + threadIdx.x, step = std::int64_t{gridDim.x} * kThreads;
    for (std::int64_t i = first; i < tokens * H; i += step) rule.step(i / H, i % H);
}

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline Device current_device() {
    int id = 0, major = 0, minor = 0;
    Device device{};
    check(cudaGetDevice(&id), "the GPU can't be asked");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id), "the GPU can't be asked");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, id), "the GPU can't be asked");
    check(cudaDeviceGetAttribute(&device.processors, cudaDevAttrMultiProcessorCount, id), "the GPU can't be asked");
    check(cudaDeviceGetAttribute(&device.shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, id), "the GPU can't be asked");
    device.arch = 10 * major + minor;
    if (device.arch < 80)
        throw std::runtime_error("the CUDA kernels need compute capability 8.0, got " + std::to_string(device.arch / 10.0));
    return device;
}

// A launch of `groups` groups of a plan.
struct Launch {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attribute{};

    Launch(const Plan& plan, std::int64_t groups, void* stream) {
        if (groups * plan.blocks > 0x7fffffff) throw std::invalid_argument("too many sequences for one launch");
        config.gridDim = dim3(static_cast<unsigned>(groups * plan.blocks));
        config.blockDim = dim3(kThreads);
        config.dynamicSmemBytes = plan.shared;
        config.stream = static_cast<cudaStream_t>(stream);
        if (plan.meeting == Meeting::alone) return;
        if (plan.meeting == Meeting::cluster) {
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = static_cast<unsigned>(plan.blocks);
            attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        } else {
            attribute.id = cudaLaunchAttributeCooperative;
            attribute.val.cooperative = 1;
        }
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
    Launch(const Launch&) = delete;
};

// The blocks of a kernel that are on the chip at once.
template <class K>
std::int64_t resident_blocks(K* kernel, const Plan& plan, const Device& device) {
    int count = 0;
    cudaError_t error;
    if (plan.meeting == Meeting::cluster) {
        const Launch launch(plan, 1, nullptr);
        error = cudaOccupancyMaxActiveClusters(&count, kernel, &launch.config);
        count *= plan.blocks;
    } else {
        error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, kThreads, plan.shared);
        count *= device.processors;
    }
    if (error != cudaSuccess) cudaGetLastError();  // so large a cluster is not for this GPU; the error would stay
    return error == cudaSuccess ? count : 0;
}

// The plan for a rule's kernel on the current device; found once for a size.
template <class Rule>
Plan plan_of(std::int64_t T, std::int64_t B, std::int64_t H) {
    using E = typename Rule::Element;
    static std::mutex guard;
    static std::map<std::tuple<int, std::int64_t, std::int64_t, std::int64_t>, Plan> plans;
    int id = 0;
    check(cudaGetDevice(&id), "the GPU can't be asked");
    const std::lock_guard<std::mutex> lock(guard);
    const auto [place, is_new] = plans.try_emplace({id, T, B, H});
    if (!is_new) return place->second;
    try {
        const auto kernel = recur<Rule>;
        const Device device = current_device();
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, device.shared), "shared memory");
        if (device.arch >= 90)
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "clusters of 16");
        const auto resident = [&](const Plan& plan) { return resident_blocks(kernel, plan, device); };
        return place->second = choose({T, B, H, Rule::kFrom, Rule::kTo, tile_shape<E>}, device, resident);
    } catch (...) {
        plans.erase(place);
        throw;
    }
}

// The rules of a cell. Tensors are in the order of the signatures in csrc/cpu/<cell>.cpp; h is state 0, c state 1.
template <class E_, template <class> class CellOf>
struct Recurrent {
    using Cell = CellOf<float>;
    using E = E_;
    static constexpr int G = Cell::kGates, K = Cell::kKept, S = Cell::kStates;
    static constexpr bool keeps_gates = K > 1, reads_h = Cell::kSplit;

    // Tensors [T, B, L, n H], a unit at a time; an absent one reads as zero and is not written.
    template <int n, class P>
    struct Steps {
        P* data;
        std::int64_t H;

        __device__ void load(std::int64_t at, std::int64_t j, float* to) const {
            for (int g = 0; g < n; ++g) to[g] = data ? wide(data[(at * n + g) * H + j]) : 0.0f;
        }
        __device__ void store(std::int64_t at, std::int64_t j, const float* from) const {
            if (!data) return;
            for (int g = 0; g < n; ++g) data[(at * n + g) * H + j] = narrow<E>(from[g]);
        }
        __device__ void clear(std::int64_t at, std::int64_t j) const {
            const float zeros[n] = {};
            store(at, j, zeros);
        }
        __device__ void fetch(std::int64_t at, std::int64_t j) const {
            if (!data) return;
            for (int g = 0; g < n; ++g) prefetch(data + (at * n + g) * H + j);
        }
    };
    template <int n>
    using In = Steps<n, const E>;
    template <int n>
    using Out = Steps<n, E>;

    // The states, [T, B, L, H] each, or [T, B, H]: those of `In` that the cell's formulas read.
    template <class P>
    struct States {
        Steps<1, P> state[S];

        __device__ void load(std::int64_t at, std::int64_t j, float* to) const {
            for (int s = 0; s < S; ++s) state[s].load(at, j, to + s);
        }
        __device__ void store(std::int64_t at, std::int64_t j, const float* from) const {
            for (int s = 0; s < S; ++s) state[s].store(at, j, from + s);
        }
        __device__ void clear(std::int64_t at, std::int64_t j) const {
            for (int s = 0; s < S; ++s) state[s].clear(at, j);
        }
        __device__ void fetch(std::int64_t at, std::int64_t j) const {
            for (int s = 0; s < S; ++s) state[s].fetch(at, j);
        }
    };

    template <class P>
    static States<P> states(Tensors<E>& tensors, std::int64_t H, bool all = true) {
        States<P> found{};
        for (int s = 0; s < S; ++s) found.state[s] = {tensors.next(all || s || reads_h), H};
        return found;
    }

    template <class Rule>
    static Plan launch(const Call& call, const E* w, const void* lengths, const Rule& rule) {
        const auto &size = call.sizes;
        const std::int64_t T = size[0], B = size[1], L = size[2], H = size[3];
        if (!T || !B || !H) return {};
        Sequences<E> q{};
        q.T = T, q.B = B, q.L = L, q.H = H, q.reverse = call.scalars.at(0) != 0;
        q.lengths = static_cast<const std::int64_t*>(lengths);
        q.plan = plan_of<Rule>(T, B, H);
        const std::int64_t items = T * q.plan.parts;
        const std::int64_t weights = 16 * T * q.plan.blocks * q.slice(), exchange = 16 * items * 2 * q.exchanged();
        const std::int64_t carry = up16(4 * T * B * S * H);
        char* memory = static_cast<char*>(call.allocate(static_cast<std::size_t>(weights + exchange + carry + 4 * items)));
        q.weights = reinterpret_cast<uint4*>(memory);
        q.exchange = reinterpret_cast<uint4*>(memory += weights);
        q.carry = reinterpret_cast<float*>(memory += exchange);
        q.counters = reinterpret_cast<unsigned*>(memory + carry);
        spread_over(weights / 16, prepare<E>, call.stream, q, w, G, Rule::kBack);
        const Launch grid(q.plan, q.plan.groups, call.stream);
        check(cudaLaunchKernelEx(&grid.config, recur<Rule>, q, rule), "a recurrence was not launched");
        return q.plan;
    }

    static std::int64_t up16(std::int64_t bytes) { return (bytes + 15) / 16 * 16; }

    // Launches a kernel whose threads share `count` pieces of work.
    template <class... Parameters, class... Arguments>
    static void spread_over(std::int64_t count, void (*kernel)(Parameters...), void* stream, const Arguments&... arguments) {
        cudaLaunchConfig_t config{};
        config.gridDim = dim3(static_cast<unsigned>(std::min<std::int64_t>((count + kThreads - 1) / kThreads, 4096)));
        config.blockDim = dim3(kThreads);
        config.stream = static_cast<cudaStream_t>(stream);
        check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "a kernel was not launched");
    }

    struct Forward {
        using Element = E;
        static constexpr bool kBack = false;
        static constexpr int kStates = S, kFrom = 1, kTo = G;
        In<G> u;
        const E* b_hh;
        std::int64_t B;
        States<const E> first;
        Out<1> y;
        States<E> last;
        Out<K> kept;
        States<E> before;

        __device__ void begin(std::int64_t row, std::int64_t j, float* s) const { first.load(row, j, s); }
        __device__ void prefetch(std::int64_t at, std::int64_t j) const { u.fetch(at, j); }
        __device__ void step(std::int64_t row, std::int64_t at, std::int64_t j, float* p, float* s, float* left) const {
            float inputs[G], gates[K], bias[G];
            u.load(at, j, inputs);
            In<G>{b_hh, u.H}.load(row / B, j, bias);
            for (int g = 0; g < G; ++g) p[g] += bias[g];
            before.store(at, j, s);
            Cell::forward(inputs, p, s, gates);
            if (keeps_gates) kept.store(at, j, gates);
            y.store(at, j, s);
            left[0] = s[0];
        }
        __device__ void skip(std::int64_t at, std::int64_t j, const float*, float* s, float* left) const {
            y.clear(at, j), kept.clear(at, j), before.clear(at, j);
            left[0] = s[0];
        }
        __device__ void end(std::int64_t row, std::int64_t j, const float* s) const { last.store(row, j, s); }
    };

    static Plan forward(const Call& call) {
        Tensors<E> tensors(call);
        const std::int64_t B = call.sizes.at(1), H = call.sizes.at(3);
        const In<G> u{tensors.next(), H};
        const E *w = tensors.next(), *b_hh = tensors.next(Cell::kSplit);
        const auto first = states<const E>(tensors, H);
        const void* lengths = tensors.next();
        const Out<1> y{tensors.next(), H};
        const auto last = states<E>(tensors, H);
        const Out<K> kept{tensors.next(keeps_gates), H};
        const auto before = states<E>(tensors, H);
        tensors.finish();
        return launch(call, w, lengths, Forward{u, b_hh, B, first, y, last, kept, before});
    }

    struct Jvp {
        using Element = E;
        static constexpr bool kBack = false;
        static constexpr int kStates = S, kFrom = 1, kTo = G;
        In<G> t_u, t_p;
        In<K> kept;
        States<const E> before, t_first;
        Out<1> t_y;
        States<E> t_last;
        Out<K> t_kept;
        States<E> t_before;

        __device__ void begin(std::int64_t row, std::int64_t j, float* t_s) const { t_first.load(row, j, t_s); }
        __device__ void prefetch(std::int64_t at, std::int64_t j) const {
            t_u.fetch(at, j), t_p.fetch(at, j), kept.fetch(at, j), before.fetch(at, j);
        }
        __device__ void step(std::int64_t, std::int64_t at, std::int64_t j, float* p, float* t_s, float* left) const {
            float u[G], more[G], gates[K], s[S], t_gates[K];
            t_u.load(at, j, u);
            t_p.load(at, j, more);
            for (int g = 0; g < G; ++g) p[g] += more[g];
            kept.load(at, j, gates);
            before.load(at, j, s);
            t_before.store(at, j, t_s);
            Cell::jvp(gates, s, u, p, t_s, t_gates);
            if (keeps_gates) t_kept.store(at, j, t_gates);
            t_y.store(at, j, t_s);
            left[0] = t_s[0];
        }
        __device__ void skip(std::int64_t at, std::int64_t j, const float*, float* t_s, float* left) const {
            t_y.clear(at, j), t_kept.clear(at, j), t_before.clear(at, j);
            left[0] = t_s[0];
        }
        __device__ void end(std::int64_t row, std::int64_t j, const float* t_s) const { t_last.store(row, j, t_s); }
    };

    static Plan jvp(const Call& call) {
        Tensors<E> tensors(call);
        const std::int64_t H = call.sizes.at(3);
        const In<G> t_u{tensors.next(), H};
        const E* w = tensors.next();
        const In<G> t_p{tensors.next(Cell::kSplit), H};
        const In<K> kept{tensors.next(), H};
        const auto before = states<const E>(tensors, H, false), t_first = states<const E>(tensors, H);
        const void* lengths = tensors.next();
        const Out<1> t_y{tensors.next(), H};
        const auto t_last = states<E>(tensors, H);
        const Out<K> t_kept{tensors.next(keeps_gates), H};
        const auto t_before = states<E>(tensors, H);
        tensors.finish();
        return launch(call, w, lengths, Jvp{t_u, t_p, kept, before, t_first, t_y, t_last, t_kept, t_before});
    }

    // What the two rules that go back share: Rule::pull turns the cotangents of a step's states into those before it.
    template <class Rule>
    struct Back {
        using Element = E;
        static constexpr bool kBack = true;
        static constexpr int kStates = S, kFrom = G, kTo = 1;
        In<1> ct_y;
        States<const E> ct_last;
        Out<G> ct_a, ct_u;
        States<E> ct_first;
        Rule rule;

        __device__ void begin(std::int64_t row, std::int64_t j, float* s) const { ct_last.load(row, j, s); }
        __device__ void prefetch(std::int64_t at, std::int64_t j) const { ct_y.fetch(at, j), rule.prefetch(at, j); }
        __device__ void step(std::int64_t, std::int64_t at, std::int64_t j, const float* p, float* ct, float* left) const {
            float y[1], u[G];
            ct_y.load(at, j, y);
            ct[0] += y[0] + p[0];
            rule.pull(at, j, ct, left, u);
            ct_a.store(at, j, left);
            if (Cell::kSplit) ct_u.store(at, j, u);
        }
        __device__ void skip(std::int64_t at, std::int64_t j, const float* p, float* ct, float* left) const {
            ct_a.clear(at, j), ct_u.clear(at, j), rule.clear(at, j);
            ct[0] += p[0];
            for (int g = 0; g < G; ++g) left[g] = 0;
        }
        __device__ void end(std::int64_t row, std::int64_t j, const float* ct) const { ct_first.store(row, j, ct); }
    };

    struct Vjp {
        In<K> kept;
        States<const E> before;
        States<E> cts;  // the total cotangents of the states after each step

        __device__ void prefetch(std::int64_t at, std::int64_t j) const { kept.fetch(at, j), before.fetch(at, j); }
        __device__ void pull(std::int64_t at, std::int64_t j, float* ct, float* ct_a, float* ct_u) const {
            float gates[K], s[S], total[S];
            kept.load(at, j, gates);
            before.load(at, j, s);
            Cell::total(gates, s, ct);
            cts.store(at, j, ct);
            for (int i = 0; i < S; ++i) total[i] = ct[i];
            Cell::vjp(gates, s, total, ct_a, ct_u, ct);
        }
        __device__ void clear(std::int64_t at, std::int64_t j) const { cts.clear(at, j); }
    };

    static Plan vjp(const Call& call) {
        Tensors<E> tensors(call);
        const std::int64_t H = call.sizes.at(3);
        const In<1> ct_y{tensors.next(), H};
        const E* w = tensors.next();
        const In<K> kept{tensors.next(), H};
        const auto before = states<const E>(tensors, H, false), ct_last = states<const E>(tensors, H);
        const void* lengths = tensors.next();
        const Out<G> ct_a{tensors.next(), H}, ct_u{tensors.next(Cell::kSplit), H};
        const auto ct_first = states<E>(tensors, H), cts = states<E>(tensors, H);
        tensors.finish();
        return launch(call, w, lengths, Back<Vjp>{ct_y, ct_last, ct_a, ct_u, ct_first, {kept, before, cts}});
    }

    // ct_a and ct_u of all steps, from the total cotangents.
    struct Cotangents {
        States<const E> cts;
        In<K> kept;
        States<const E> before;
        Out<G> ct_a, ct_u;

        __device__ void step(std::int64_t at, std::int64_t j) const {
            float gates[K], s[S], ct[S], a[G], u[G], back[S];
            cts.load(at, j, ct);
            kept.load(at, j, gates);
            before.load(at, j, s);
            Cell::vjp(gates, s, ct, a, u, back);
            ct_a.store(at, j, a);
            if (Cell::kSplit) ct_u.store(at, j, u);
        }
    };

    static Plan cotangents(const Call& call) {
        Tensors<E> tensors(call);
        const auto& size = call.sizes;
        const std::int64_t tokens = size.at(0) * size.at(1) * size.at(2), H = size.at(3);
        const auto cts = states<const E>(tensors, H);
        const In<K> kept{tensors.next(), H};
        const auto before = states<const E>(tensors, H, false);
        const Out<G> ct_a{tensors.next(), H}, ct_u{tensors.next(Cell::kSplit), H};
        tensors.finish();
        const Cotangents rule{cts, kept, before, ct_a, ct_u};
        if (tokens && H) spread_over(tokens * H, apply<Cotangents>, call.stream, tokens, H, rule);
        return {};
    }

    struct VjpJvp {
        In<K> kept, t_kept;
        States<const E> before, t_before, cts;
        In<1> source;  // what reaches the state before each step beside the recurrence: ct_a t_W_hh

        __device__ void prefetch(std::int64_t at, std::int64_t j) const {
            kept.fetch(at, j), t_kept.fetch(at, j), before.fetch(at, j), t_before.fetch(at, j);
            cts.fetch(at, j), source.fetch(at, j);
        }
        __device__ void pull(std::int64_t at, std::int64_t j, float* t_ct, float* t_ct_a, float* t_ct_u) const {
            float gates[K], t_gates[K], s[S], t_s[S], ct[S], t_total[S], extra[1];
            kept.load(at, j, gates);
            t_kept.load(at, j, t_gates);
            before.load(at, j, s);
            t_before.load(at, j, t_s);
            cts.load(at, j, ct);
            source.load(at, j, extra);
            for (int i = 0; i < S; ++i) t_total[i] = t_ct[i];
            Cell::vjp_jvp(gates, s, t_gates, t_s, ct, t_total, t_ct_a, t_ct_u, t_ct);
            t_ct[0] += extra[0];
        }
        __device__ void clear(std::int64_t, std::int64_t) const {}
    };

    static Plan vjp_jvp(const Call& call) {
        Tensors<E> tensors(call);
        const std::int64_t H = call.sizes.at(3);
        const auto cts = states<const E>(tensors, H);
        const E* w = tensors.next();
        const In<K> kept{tensors.next(), H};
        const auto before = states<const E>(tensors, H, false);
        const In<K> t_kept{tensors.next(), H};
        const auto t_before = states<const E>(tensors, H, false);
        const In<1> source{tensors.next(), H}, t_ct_y{tensors.next(), H};
        const auto t_ct_last = states<const E>(tensors, H);
        const void* lengths = tensors.next();
        const Out<G> t_ct_a{tensors.next(), H}, t_ct_u{tensors.next(Cell::kSplit), H};
        const auto t_ct_first = states<E>(tensors, H);
        tensors.finish();
        const VjpJvp rule{kept, t_kept, before, t_before, cts, source};
        return launch(call, w, lengths, Back<VjpJvp>{t_ct_y, t_ct_last, t_ct_a, t_ct_u, t_ct_first, rule});
    }
};

// The rows of a cell in the table of kernels.
#define METAKERN_RULE(cell, rule, Cell) {cell "_" #rule, {Recurrent<float, Cell>::rule, Recurrent<Bf16, Cell>::rule}}
#define METAKERN_RULES(cell, Cell)                                                                         \
    METAKERN_RULE(cell, forward, Cell), METAKERN_RULE(cell, jvp, Cell), METAKERN_RULE(cell, vjp, Cell),    \
        METAKERN_RULE(cell, cotangents, Cell), METAKERN_RULE(cell, vjp_jvp, Cell)

}  // namespace metakern::cuda
