// How a recurrence is laid out on a GPU: which blocks work together, on what, and what they keep in shared memory.
//
// A group of `blocks` blocks runs `rows` sequences of one task from the first step to the last. Each block computes
// `units` hidden units with all their gates, and multiplies with the slice of W for them: `iterations` times `vectors`
// vectors of 16 bytes. The first `resident` iterations stay in shared memory; the others are read from L2 at each step.
// In an iteration each of the `crew` workers of a block multiplies one piece; `splits` workers share each of the
// `columns` groups of columns.
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
    int rows, parts;  // sequences of a part, parts of a task
    std::int64_t groups;  // groups that are launched; each runs every groups-th part of all tasks
    std::size_t shared;   // bytes of shared memory of a block
};

// The pieces of a product, for a dtype: see Tile in recurrent/tiles.cuh.
struct TileShape {
    int rows, columns, depth, vectors, lanes, left, granule;
};

struct Problem {
    std::int64_t T, B, H;
    int from, to;  // for each hidden unit, the numbers that a product takes and gives
    TileShape tile;
};

struct Device {
    int arch, processors, shared;  // 80 or 90, multiprocessors, bytes of shared memory that a block may have
};

// The number of blocks of a plan that the GPU can run at once, as the CUDA runtime counts them; 0 if none.
using Resident = std::function<std::int64_t(const Plan&)>;

// The plan with the least expected time. Throws std::runtime_error if none fits the device.
Plan choose(const Problem& problem, const Device& device, const Resident& resident);

}  // namespace metakern::cuda
