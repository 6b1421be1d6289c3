// How a sequence's work is laid out on a GPU: which blocks work together, on what, and what they keep in shared memory.
//
// A group of `blocks` blocks runs `rows` sequences of one task from the first step to the last. Each block owns `units`
// hidden units, all their gates, and with them the slice of W that gives them: `iterations` times `vectors` vectors of 16
// bytes, of which the first `resident` iterations stay in shared memory and the others are read from L2 at each step. In an
// iteration the `crew` workers of a block, `splits` for each of its `columns` groups of columns, multiply one piece each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace metakern::cuda {

constexpr int kThreads = 256;

// How the blocks of a group wait for each other: alone, as a cluster (sm_90), or by a counter in global memory.
enum class Meeting : int { alone, cluster, counter };

struct Plan {
    Meeting meeting;
    int blocks, units, columns, splits, crew, vectors, iterations, resident;
    int chunk;    // iterations whose left operand is in shared memory at once
    int pitch;    // vectors from a row of the left operand to the next, in shared memory
    int depth;    // vectors of a row of the left operand in global memory
    int spread;   // numbers from a row of sums to the next
    int rows, parts;  // sequences of a group, groups of a task
    std::int64_t groups;  // that are launched; each takes every groups-th part
    std::size_t shared;   // bytes of shared memory of a block
};

// The pieces of a product, for a dtype: see Tile in recurrent/tiles.cuh.
struct TileShape {
    int rows, columns, depth, vectors, lanes, left, granule;
};

struct Problem {
    std::int64_t T, B, H;
    int from, to;  // numbers of a unit that are multiplied, and that come out
    TileShape tile;
};

struct Device {
    int arch, processors, shared;  // 80 or 90, multiprocessors, bytes of shared memory that a block may have
};

// Blocks of a plan that can be on the chip at once, as the runtime counts them; 0 if none.
using Resident = std::function<std::int64_t(const Plan&)>;

// The plan that is expected to take the least time; throws std::runtime_error where none fits the device.
Plan choose(const Problem& problem, const Device& device, const Resident& resident);

}  // namespace metakern::cuda
