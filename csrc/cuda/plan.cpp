#include "plan.h"

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>

namespace metakern::cuda {
namespace {

// Rough costs in clock cycles. The choice depends only on their ratios.
constexpr double kResidentBytes = 64, kStreamedBytes = 24, kExchangedBytes = 32;  // bytes in a cycle
constexpr double kMeeting[] = {200, 1500, 3000}, kTile = 1200;

template <class I>
I up(I a, I b) {
    return (a + b - 1) / b;
}

// The plan with groups of `blocks` blocks, and each task's sequences in about `parts` parts; none if it does not fit.
std::optional<Plan> layout(const Problem& p, const Device& device, int blocks, std::int64_t parts) {
    const TileShape& tile = p.tile;
    const std::int64_t units = up(up(p.H, std::int64_t{blocks}), std::int64_t{tile.granule}) * tile.granule;
    const std::int64_t depth = up(p.H * p.from, std::int64_t{tile.depth}), columns = units * p.to / tile.columns;
    if (units > 1 << 20 || depth > 1 << 24) return {};
    Plan plan{};
    plan.meeting = blocks == 1                            ? Meeting::alone
                   : device.arch >= 90 && blocks <= 16 ? Meeting::cluster
                                                          : Meeting::counter;
    plan.blocks = blocks;
    plan.units = static_cast<int>(units);
    plan.columns = static_cast<int>(columns);
    plan.splits = static_cast<int>(std::min<std::int64_t>(std::max<std::int64_t>(1, kThreads / tile.lanes / columns), depth));
    plan.crew = plan.splits * plan.columns;
    plan.vectors = tile.vectors * plan.crew * tile.lanes;
    plan.iterations = static_cast<int>(up(depth, std::int64_t{plan.splits}));
    const int left = plan.splits * tile.left;  // vectors of a row of the left operand in an iteration
    plan.depth = plan.iterations * left;
    plan.chunk = std::clamp(device.shared / 6 / (16 * tile.rows * left), 1, plan.iterations);
    plan.pitch = plan.chunk * left;
    if (plan.pitch % 8 == 0) plan.pitch += 4;  // so that the rows that a warp reads at once lie in different banks
    plan.spread = plan.columns * tile.columns + 4;
    const std::int64_t fixed = 16 * std::int64_t{tile.rows} * plan.pitch +
                               4 * std::int64_t{plan.splits} * tile.rows * plan.spread;
    if (fixed > device.shared) return {};
    plan.resident = static_cast<int>(
        std::min<std::int64_t>((device.shared - fixed) / (16 * std::int64_t{plan.vectors}), plan.iterations));
    plan.shared = static_cast<std::size_t>(fixed + 16 * std::int64_t{plan.vectors} * plan.resident);
    plan.rows = static_cast<int>(std::min(up(up(p.B, parts), std::int64_t{tile.rows}) * tile.rows, std::int64_t{1} << 30));
    plan.parts = static_cast<int>(up(p.B, std::int64_t{plan.rows}));
    return plan;
}

// The expected cycles of one step of all sequences, if the GPU runs `resident` blocks at once.
double cost(const Problem& p, const Plan& plan, std::int64_t resident) {
    const double tiles = up(plan.rows, p.tile.rows), waves = double(up(p.T * plan.parts, resident / plan.blocks));
    const double rows = double(std::min<std::int64_t>(p.tile.rows, p.B));
    const double slice = 16.0 * plan.vectors, exchanged = 16.0 * rows * plan.depth;
    const double product = slice * plan.resident / kResidentBytes + slice * (plan.iterations - plan.resident) / kStreamedBytes;
    const double cells = rows * plan.units / kThreads * kTile / 2;
    return waves * (kMeeting[int(plan.meeting)] + tiles * (product + exchanged / kExchangedBytes + cells + kTile));
}

}  // namespace

Plan choose(const Problem& p, const Device& device, const Resident& resident) {
    std::optional<Plan> best;
    double least = 0;
    const std::int64_t tiles = up(p.B, std::int64_t{p.tile.rows});
    for (int blocks = 1; blocks <= device.processors; blocks *= 2) {
        if (blocks > up(p.H, std::int64_t{p.tile.granule})) break;
        for (std::int64_t parts = 1;; parts = std::min(2 * parts, tiles)) {
            std::optional<Plan> plan = layout(p, device, blocks, parts);
            const std::int64_t fit = plan ? resident(*plan) : 0;
            if (fit >= blocks) {
                const std::int64_t all = p.T * plan->parts;
                plan->groups = plan->meeting == Meeting::counter ? std::min(all, fit / blocks) : all;
                const double expected = cost(p, *plan, fit);
                if (!best || expected < least) best = plan, least = expected;
            }
            if (parts >= tiles) break;
        }
    }
    if (!best)
        throw std::runtime_error("no launch fits this GPU for " + std::to_string(p.H) + " hidden units: use the reference backend");
    return *best;
}

}  // namespace metakern::cuda
