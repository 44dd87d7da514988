// The thin layer between the kernels and the machine: memory accesses with a cache policy, conversions, ex2, 1/x and
// shared memory. The kernels use nothing of CUDA beside this, async.cuh, thread indices, barriers and shuffles, so that
// tests/host_cuda can run the very same files on a CPU, every function below replaced by one with its meaning.
#pragma once

#include <stdint.h>

#if !defined(__CUDACC__)
#include "host_cuda.h"
#else

namespace fused_losses {

// 2^x with a relative error of at most 2^-22, one MUFU; exact at 0. Subnormal results are 0: beside the row's maximum,
// whose term is exactly 1, they could not be seen. The argument (x - max) c comes with three roundings, a relative
// error of at most |argument| 2^-23 in the result: 2^-17 where p is e^-50.
__device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// 1 / x to 1 ulp, one MUFU.
__device__ __forceinline__ float reciprocal_approx(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// Rounded; never half of an fma.
__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }

// Of two numbers each the same as of one; from sm_100 on in one instruction. The compiler forms none of these by
// itself.
__device__ __forceinline__ float2 multiply_add(float2 a, float2 b, float2 c) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    float2 d;
    asm("{.reg .b64 a, b, c, d; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5}; mov.b64 c, {%6, %7};\n"
        "fma.rn.f32x2 d, a, b, c; mov.b64 {%0, %1}, d;}"
        : "=f"(d.x), "=f"(d.y)
        : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y), "f"(c.x), "f"(c.y));
    return d;
#else
    return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}
__device__ __forceinline__ float2 multiply(float2 a, float2 b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    float2 c;
    asm("{.reg .b64 a, b, c; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5};\n"
        "mul.rn.f32x2 c, a, b; mov.b64 {%0, %1}, c;}"
        : "=f"(c.x), "=f"(c.y)
        : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y));
    return c;
#else
    return {multiply(a.x, b.x), multiply(a.y, b.y)};
#endif
}
__device__ __forceinline__ float2 plus(float2 a, float2 b) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
    float2 c;
    asm("{.reg .b64 a, b, c; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5};\n"
        "add.rn.f32x2 c, a, b; mov.b64 {%0, %1}, c;}"
        : "=f"(c.x), "=f"(c.y)
        : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y));
    return c;
#else
    return {a.x + b.x, a.y + b.y};
#endif
}

// Will be read again soon: L1 and L2 keep it as usual. Not the non-coherent path: in place, the row is written later.
__device__ __forceinline__ uint4 load(const uint4* p) { return *p; }

// The same of a line that L2 is to keep before all others, until load_last: what is read and written beside it, twice
// as much as L2 holds, would push it out.
__device__ __forceinline__ uint4 load_kept(const uint4* p) {
    uint64_t last;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(last));
    uint4 v;
    asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(last)
                 : "memory");
    return v;
}

// Last use of the line: evicted first, so that it does not push out the rows that are still to be swept again.
__device__ __forceinline__ uint4 load_last(const uint4* p) { return __ldcs(p); }
__device__ __forceinline__ void store_streaming(uint4* p, uint4 v) { __stcs(p, v); }

// Element 0 of a pair is the low half.
__device__ __forceinline__ float2 from_bfloat16x2(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
__device__ __forceinline__ uint32_t to_bfloat16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}
__device__ __forceinline__ float2 from_float16x2(uint32_t pair) {
    float low, high;
    asm("{.reg .f16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
        : "=f"(low), "=f"(high)
        : "r"(pair));
    return {low, high};
}
__device__ __forceinline__ uint32_t to_float16x2(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// The larger of each half, and the smaller: of two numbers the one that is not NaN.
__device__ __forceinline__ uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
    uint32_t larger;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}
__device__ __forceinline__ uint32_t max_float16x2(uint32_t a, uint32_t b) {
    uint32_t larger;
    asm("max.f16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));
    return larger;
}

__device__ __forceinline__ uint32_t min_bfloat16x2(uint32_t a, uint32_t b) {
    uint32_t smaller;
    asm("min.bf16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
    return smaller;
}
__device__ __forceinline__ uint32_t min_float16x2(uint32_t a, uint32_t b) {
    uint32_t smaller;
    asm("min.f16x2 %0, %1, %2;" : "=r"(smaller) : "r"(a), "r"(b));
    return smaller;
}

// How many zeros are below the lowest one; 32 of 0.
__device__ __forceinline__ int zeros_below(uint32_t x) { return __clz(static_cast<int>(__brev(x))); }

// The same number, which the compiler can't know to be one: what is formed of it is formed again, and takes no register
// until then.
__device__ __forceinline__ int of_unknown_origin(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
// And what it was formed of is not formed again, for want of a register.
__device__ __forceinline__ float of_unknown_origin(float x) {
    asm volatile("" : "+f"(x));
    return x;
}

// The same pointer, which the compiler can't know to be one to global memory.
template <class T>
__device__ __forceinline__ T* in_global(T* p) {
    __builtin_assume(__isGlobal(p));
    return p;
}

// The block's shared memory, of which the launch asked for sizeof(S); not initialised.
template <class S>
__device__ __forceinline__ S& shared_memory() {
    extern __shared__ __align__(128) uint4 bytes[];
    return *reinterpret_cast<S*>(bytes);
}

}  // namespace fused_losses
#endif
