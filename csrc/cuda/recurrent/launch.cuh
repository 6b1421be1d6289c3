// Launching a recurrence: what the current device has, the plan for it, and the memory of a call.
#pragma once

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../kernel.h"
#include "driver.cuh"

namespace metakern::cuda {

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

// Launches a kernel whose threads share `count` pieces of work.
template <class... Parameters, class... Arguments>
void spread_over(std::int64_t count, void (*kernel)(Parameters...), void* stream, const Arguments&... arguments) {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(std::min<std::int64_t>((count + kThreads - 1) / kThreads, 4096)));
    config.blockDim = dim3(kThreads);
    config.stream = static_cast<cudaStream_t>(stream);
    check(cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...), "a kernel was not launched");
}

// Runs a rule over the sequences of a call: plans it, gives it memory, lays out W and launches. Returns the plan.
template <class Rule>
Plan run(const Call& call, const typename Rule::Element* w, const void* lengths, const Rule& rule) {
    using E = typename Rule::Element;
    constexpr int gates = Rule::kBack ? Rule::kFrom : Rule::kTo;
    const auto up16 = [](std::int64_t bytes) { return (bytes + 15) / 16 * 16; };
    const auto &size = call.sizes;
    const std::int64_t T = size[0], B = size[1], L = size[2], H = size[3];
    if (!T || !B || !H) return {};
    Sequences<E> q{};
    q.T = T, q.B = B, q.L = L, q.H = H, q.reverse = call.scalars.at(0) != 0;
    q.lengths = static_cast<const std::int64_t*>(lengths);
    q.plan = plan_of<Rule>(T, B, H);
    const std::int64_t items = T * q.plan.parts;
    const std::int64_t weights = 16 * T * q.plan.blocks * q.slice(), exchange = 16 * items * 2 * q.exchanged();
    const std::int64_t carry = up16(4 * T * B * Rule::kStates * H);
    char* memory = static_cast<char*>(call.allocate(static_cast<std::size_t>(weights + exchange + carry + 4 * items)));
    q.weights = reinterpret_cast<uint4*>(memory);
    q.exchange = reinterpret_cast<uint4*>(memory += weights);
    q.carry = reinterpret_cast<float*>(memory += exchange);
    q.counters = reinterpret_cast<unsigned*>(memory + carry);
    spread_over(weights / 16, prepare<E>, call.stream, q, w, gates, Rule::kBack);
    const Launch grid(q.plan, q.plan.groups, call.stream);
    check(cudaLaunchKernelEx(&grid.config, recur<Rule>, q, rule), "a recurrence was not launched");
    return q.plan;
}

}  // namespace metakern::cuda
