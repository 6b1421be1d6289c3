// An emulated GPU: the parts of csrc/cuda/common.cuh and of the CUDA runtime that the kernels use, so that g++ can compile
// them for a CPU.
//
// Each thread of the blocks that run at once is a fiber. It runs until it waits for its block, its warp, its cluster or a
// counter. The fiber that runs next is drawn at random, as is the order of blocks, so that a missing barrier soon shows.
// Shared memory starts as NaN, with a guard behind it. A launch that exceeds a limit of the device fails as it does with CUDA.
//
// Memory is as weak as CUDA allows. What a thread stores for others is seen by itself alone, by its block from the next
// __syncthreads on, and by other blocks once it is released (by a fence of a thread that sees it, or an arrival at a cluster's
// barrier) and they have acquired (by a load_acquire, or the end of that barrier). Until then they load old values.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
    unsigned x = 1, y = 1, z = 1;
    dim3(unsigned n = 1) : x(n) {}
};
struct alignas(16) uint4 {
    std::uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};

namespace emulation {

struct Index {
    unsigned x;
};

// Runs `grid` blocks of `threads` threads, `together` blocks at once, in clusters of `cluster`; `body` is one thread.
void run(unsigned grid, unsigned threads, unsigned together, unsigned cluster, std::size_t shared,
         const std::function<void()>& body);

enum class Place { warp, block, cluster };
void meet(Place place);
void pause();  // lets other threads run
void* shared_memory();
void store(std::uint16_t* to, std::uint16_t value);
std::uint16_t load(const std::uint16_t* from);
void release();
void acquire();
// 32 bytes for each lane of the warp, valid from one meet(Place::warp) to the next.
std::uint32_t (*warp_memory())[8];

struct Gpu {
    int id, arch, processors, shared, largest_cluster;
    bool idle;  // launches are checked and not run
};
extern Gpu gpu;

// What is left out of the next launches, to see that tests notice it.
enum class Fault { none, block, release, acquire, load };
extern Fault fault;

}  // namespace emulation

extern emulation::Index threadIdx, blockIdx, gridDim;

inline void __syncthreads() { emulation::meet(emulation::Place::block); }
inline void __threadfence() { emulation::release(); }
inline void atomicAdd(unsigned* to, unsigned value) { *to += value; }
inline float __uint_as_float(std::uint32_t x) {
    float f;
    std::memcpy(&f, &x, 4);
    return f;
}
template <class A, class B>
auto min(A a, B b) {
    return a < b ? a : b;
}

namespace metakern::cuda {

struct Bf16 {
    std::uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(Bf16 x) { return __uint_as_float(std::uint32_t{x.bits} << 16); }

template <class E>
E narrow(float x) {
    return x;
}
template <>
inline Bf16 narrow<Bf16>(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if (x != x) return {0x7fff};
    return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline uint4* shared_memory() { return static_cast<uint4*>(emulation::shared_memory()); }
inline void prefetch(const void*) {}
inline void meet_warp() { emulation::meet(emulation::Place::warp); }
inline void arrive_at_cluster() { emulation::release(); }
inline void wait_for_cluster() {
    emulation::meet(emulation::Place::cluster);
    emulation::acquire();
}

template <class E>
void store_for_others(E* to, E value) {
    std::uint16_t halves[sizeof(E) / 2];
    std::memcpy(halves, &value, sizeof(E));
    for (std::size_t i = 0; i < sizeof(E) / 2; ++i) emulation::store(reinterpret_cast<std::uint16_t*>(to) + i, halves[i]);
}

inline uint4 load_written(const uint4* from) {
    std::uint16_t halves[8];
    for (std::size_t i = 0; i < 8; ++i) halves[i] = emulation::load(reinterpret_cast<const std::uint16_t*>(from) + i);
    uint4 value;
    std::memcpy(&value, halves, sizeof value);
    return value;
}

inline unsigned load_acquire(const unsigned* counter) {
    emulation::pause();
    emulation::acquire();
    return *counter;
}

inline void mma(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
    const unsigned lane = threadIdx.x % 32;
    std::uint32_t(*const warp)[8] = emulation::warp_memory();
    const std::uint32_t mine[8] = {a.x, a.y, a.z, a.w, b0, b1};
    std::memcpy(warp[lane], mine, sizeof mine);
    meet_warp();
    const auto number = [](std::uint32_t pair, unsigned half) { return wide(Bf16{static_cast<std::uint16_t>(pair >> 16 * half)}); };
    // Register r of lane 4 m + k / 2 % 4 holds a[m + 8 (r % 2)][k], k / 8 = r / 2; likewise b[k][n] of lane 4 n + k / 2 % 4.
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned m = lane / 4 + i / 2 * 8, n = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 16; ++k)
            sum[i] += number(warp[m % 8 * 4 + k / 2 % 4][m / 8 + k / 8 * 2], k % 2) * number(warp[n * 4 + k / 2 % 4][4 + k / 8], k % 2);
    }
    meet_warp();
}

}  // namespace metakern::cuda

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorCooperativeLaunchTooLarge };
enum { cudaDevAttrComputeCapabilityMajor, cudaDevAttrComputeCapabilityMinor, cudaDevAttrMultiProcessorCount,
       cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributeNonPortableClusterSizeAllowed };
enum { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
    int id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
        int cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    std::size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

inline const char* cudaGetErrorString(cudaError_t error) { return error == cudaErrorInvalidValue ? "invalid value" : "too large"; }
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* id) { return *id = emulation::gpu.id, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, int attribute, int) {
    const emulation::Gpu& gpu = emulation::gpu;
    const int values[] = {gpu.arch / 10, gpu.arch % 10, gpu.processors, gpu.shared};
    return *value = values[attribute], cudaSuccess;
}
template <class K>
cudaError_t cudaFuncSetAttribute(K*, int attribute, int value) {
    const bool fits = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize ? value <= emulation::gpu.shared : emulation::gpu.arch >= 90;
    return fits ? cudaSuccess : cudaErrorInvalidValue;
}
template <class K>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, K*, int, std::size_t shared) {
    *count = static_cast<int>(std::min<std::size_t>(2, (emulation::gpu.shared + 1024) / (shared + 1024)));
    return cudaSuccess;
}
template <class K>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, K* kernel, const cudaLaunchConfig_t* config) {
    const int size = static_cast<int>(config->attrs->val.clusterDim.x);
    if (emulation::gpu.arch < 90 || size > emulation::gpu.largest_cluster) return cudaErrorInvalidValue;
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(count, kernel, 0, config->dynamicSmemBytes);
    *count = *count * emulation::gpu.processors / size;
    return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), const Arguments&... arguments) {
    const emulation::Gpu& gpu = emulation::gpu;
    const unsigned grid = config->gridDim.x;
    unsigned cluster = 1, together = 1;
    if (!grid || config->dynamicSmemBytes > static_cast<std::size_t>(gpu.shared)) return cudaErrorInvalidValue;
    if (config->numAttrs && config->attrs->id == cudaLaunchAttributeClusterDimension) {
        together = cluster = config->attrs->val.clusterDim.x;
        if (gpu.arch < 90 || grid % cluster || cluster > static_cast<unsigned>(gpu.largest_cluster)) return cudaErrorInvalidValue;
    } else if (config->numAttrs) {
        int fit = 0;
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&fit, kernel, 0, config->dynamicSmemBytes);
        if (grid > static_cast<unsigned>(fit * gpu.processors)) return cudaErrorCooperativeLaunchTooLarge;
        together = grid;
    }
    if (!gpu.idle) emulation::run(grid, config->blockDim.x, together, cluster, config->dynamicSmemBytes, [&] { kernel(Parameters(arguments)...); });
    return cudaSuccess;
}
