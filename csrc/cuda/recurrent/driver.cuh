// A recurrence over whole sequences on a GPU, by groups of blocks, whatever the rule.
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

#include "../meeting.cuh"
#include "tiles.cuh"

namespace metakern::cuda {

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
            for (int i = 0; i < kFrom; ++i) store_for_others(to + i * q.H + j, narrow<E>(values[i]));
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

}  // namespace metakern::cuda
