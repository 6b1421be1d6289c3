// Barriers of all threads of several blocks. After one, each reads by load_written what the others have written before it by
// store_for_others.
#pragma once

#include <common.cuh>

namespace metakern::cuda {

__device__ __forceinline__ void meet_cluster() {
    arrive_at_cluster();
    wait_for_cluster();
}

// The blocks share a counter: they wait until it reaches `arrived`. All of them must be on the GPU at the same time.
__device__ __forceinline__ void meet_blocks(unsigned* counter, unsigned arrived) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1u);
        while (load_acquire(counter) < arrived) {
        }
        __threadfence();
    }
    __syncthreads();
}

}  // namespace metakern::cuda
