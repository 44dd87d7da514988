// Copies that nobody waits for until they are wanted, and the few things that only a row on chip needs. As in
// intrinsics.cuh, each function has a stand-in in tests/host_cuda: one that delivers no earlier than it must.
#pragma once

#include <stdint.h>

#if !defined(__CUDACC__)
#include "host_async.h"
#else

namespace fused_losses {

// 16 bytes from global to shared memory, past registers and L1. Only the thread that asked may read them, and only
// after wait_copies: what it then sees needs no barrier and no fence.
__device__ __forceinline__ void copy_async(uint4* shared, const uint4* global) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        "l"(global)
        : "memory");
}

// The same of one number of 4 or 8 bytes.
template <class Number>
__device__ __forceinline__ void copy_async(Number* shared, const Number* global) {
    asm volatile(
        "cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
        "l"(global), "n"(sizeof(Number))
        : "memory");
}

// Ends a group of this thread's copies; it may be empty.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// The same of as many as some & (8 | 4 | 2 | 1) empty ones. Not one by one, which takes four instructions each.
__device__ __forceinline__ void commit_nothing(int some) {
    if (some & 8)
        asm volatile(
            "cp.async.commit_group;\ncp.async.commit_group;\ncp.async.commit_group;\ncp.async.commit_group;\n"
            "cp.async.commit_group;\ncp.async.commit_group;\ncp.async.commit_group;\ncp.async.commit_group;" ::
                : "memory");
    if (some & 4)
        asm volatile("cp.async.commit_group;\ncp.async.commit_group;\ncp.async.commit_group;\ncp.async.commit_group;" ::
                         : "memory");
    if (some & 2) asm volatile("cp.async.commit_group;\ncp.async.commit_group;" ::: "memory");
    if (some & 1) commit_copies();
}

// Until all of this thread's groups but the last kPending have arrived.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// What this thread has copied, or written, there.
__device__ __forceinline__ uint4 read_slot(const uint4* slot) { return *slot; }

// By the thread that may read it, and no other.
__device__ __forceinline__ void write_slot(uint4* slot, const uint4& vector) { *slot = vector; }

// Element i of it, a raw T, in whose place another is put.
template <class T>
__device__ __forceinline__ T exchange_in_slot(uint4* slot, int i, T other) {
    T& place = reinterpret_cast<T*>(slot)[i];
    const T there = place;
    place = other;
    return there;
}

// Asks for `bytes`, a multiple of 16, to be brought to L2; by a warp, and nothing waits for it. From sm_90 on one
// instruction of one thread asks for all of it, before that for a line.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void prefetch(const void* from, int bytes) {
    if (threadIdx.x % 32 == 0 && bytes > 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}
#else
__device__ __forceinline__ void prefetch(const void* from, int bytes) {
    constexpr int kLine = 128;
    for (int at = threadIdx.x % 32 * kLine; at < bytes; at += 32 * kLine)
        asm volatile("prefetch.global.L2 [%0];" ::"l"(static_cast<const char*>(from) + at));
}
#endif

}  // namespace fused_losses
#endif
