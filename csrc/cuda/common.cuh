// What the kernels take from a GPU beside plain C++: barriers, loads past the first cache, bf16 and the tensor cores.
//
// Device code uses nothing of the GPU that is not declared here or named threadIdx, blockIdx, gridDim, __syncthreads:
// tests/cuda_emulation has all of it for a CPU, where the same kernels run under the same names.
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

// The memory of a block, as large as the launch said.
__device__ __forceinline__ uint4* shared_memory() {
    extern __shared__ uint4 memory[];
    return memory;
}

// Reads what other blocks have written during this launch: not from the first cache, which would not know.
__device__ __forceinline__ uint4 load_written(const uint4* from) { return __ldcg(from); }

__device__ __forceinline__ void prefetch(const void* from) { asm volatile("prefetch.global.L2 [%0];" ::"l"(from)); }

__device__ __forceinline__ void meet_warp() { __syncwarp(); }

// All threads of a cluster meet; what they have written, to global memory too, all of them see.
__device__ __forceinline__ void meet_cluster() {
#if __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#endif
}

// All threads of the blocks that share a counter meet; `arrived` is what it must come to, and all blocks are on the chip.
__device__ __forceinline__ void meet_blocks(unsigned* counter, unsigned arrived) {
    __syncthreads();
    if (threadIdx.x == 0) {
        unsigned seen;
        __threadfence();
        atomicAdd(counter, 1u);
        do
            asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
        while (seen < arrived);
        __threadfence();
    }
    __syncthreads();
}

// sum [16, 8] += a [16, 16] b [16, 8] by a warp, in the fragments of PTX's mma.m16n8k16; bf16 products, float32 sums.
__device__ __forceinline__ void mma(float (&sum)[4], const uint4& a, unsigned b0, unsigned b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

}  // namespace metakern::cuda
