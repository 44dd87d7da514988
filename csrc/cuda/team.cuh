// The blocks that share a row: one, or a pair in a cluster, of which each has half of it. All decisions about a row
// follow from what both have seen of it, bit by bit the same, so both come to the same barriers.
#pragma once

#include <stdint.h>

#if !defined(__CUDACC__)
#include "host_cuda.h"
#else

namespace fused_losses {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
// Of all threads of a pair: what one has written into either block's shared memory before, all see afterwards.
__device__ __forceinline__ void pair_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// The same place in the shared memory of block `rank` of the pair.
template <class T>
__device__ __forceinline__ T* place_of(T* mine, unsigned rank) {
    T* theirs;
    asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
    return theirs;
}
#else  // no clusters: launch.cu makes no pairs
__device__ __forceinline__ void pair_barrier() { __trap(); }
template <class T>
__device__ __forceinline__ T* place_of(T* mine, unsigned) {
    return mine;
}
#endif

}  // namespace fused_losses
#endif

namespace fused_losses {

// Elements of a row that are a block's.
struct Part {
    int first, size;

    // Of element j; -1 where it is another block's, or no row's.
    __device__ __forceinline__ int index_of(int j) const { return first <= j && j - first < size ? j - first : -1; }
};

class Team {
  public:
    // size: 1, or 2 in a launch of clusters of two.
    __device__ __forceinline__ explicit Team(int size = 1) : size_(size) {}

    __device__ __forceinline__ int size() const { return size_; }
    __device__ __forceinline__ int rank() const { return size_ == 1 ? 0 : blockIdx.x % 2; }
    __device__ __forceinline__ int number() const { return size_ == 1 ? blockIdx.x : blockIdx.x / 2; }
    __device__ __forceinline__ int teams() const { return size_ == 1 ? gridDim.x : gridDim.x / 2; }

    // From a multiple of 128 bytes on, as rows begin: halves have the row's phase.
    template <class T>
    __device__ __forceinline__ Part part(int vocab) const {
        if (size_ == 1) return {0, vocab};
        constexpr int kLine = 128 / sizeof(T);
        const int line = (vocab / 2 + kLine - 1) / kLine * kLine, half = line < vocab ? line : vocab;
        return rank() == 0 ? Part{0, half} : Part{half, vocab - half};
    }

    __device__ __forceinline__ void barrier() const {
        if (size_ == 1)
            __syncthreads();
        else
            pair_barrier();
    }
    // Writes x there in every block. By one thread; seen after the next barrier.
    template <class T>
    __device__ __forceinline__ void tell(T& place, const T& x) const {
        place = x;
        if (size_ == 2) *place_of(&place, 1 - rank()) = x;
    }

  private:
    const int size_;
};

}  // namespace fused_losses
