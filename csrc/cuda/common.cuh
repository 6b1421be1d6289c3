// What the kernels use of a GPU beside plain C++: what barriers are made of, loads that bypass the L1 cache, bf16 and the
// tensor cores.
//
// Device code uses nothing of a GPU but what is declared here and threadIdx, blockIdx, gridDim, __syncthreads,
// __threadfence, atomicAdd. tests/ops/cuda_emulation defines all of it under the same names for a CPU, where it runs the
// same kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace metakern::cuda {

struct Bf16 {
    std::uint16_t bits;
};

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(Bf16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

template <class E>
__device__ __forceinline__ E narrow(float x) {
    return x;
}
template <>
__device__ __forceinline__ Bf16 narrow<Bf16>(float x) {
    Bf16 rounded;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(x));
    return rounded;
}

// The shared memory of a block, whose size the launch sets.
__device__ __forceinline__ uint4* shared_memory() {
    extern __shared__ uint4 memory[];
    return memory;
}

// Writes what other blocks read during this launch, after a barrier (meeting.cuh).
template <class E>
__device__ __forceinline__ void store_for_others(E* to, E value) {
    *to = value;
}

// Reads what other blocks have written so. It bypasses the L1 cache, which may hold old values.
__device__ __forceinline__ uint4 load_written(const uint4* from) { return __ldcg(from); }

__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

__device__ __forceinline__ void meet_warp() { __syncwarp(); }

// The two halves of a barrier of a cluster. They release what this thread has written, also to global memory, and acquire
// what the others have.
__device__ __forceinline__ void arrive_at_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// Reads a counter, and acquires what was released before it had this value.
__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
    unsigned seen;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    return seen;
}

// sum [16, 8] += a [16, 16] b [16, 8], computed by a warp on fragments as PTX's mma.m16n8k16 has them; bf16 products,
// float32 sums.
__device__ __forceinline__ void mma(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

}  // namespace metakern::cuda
