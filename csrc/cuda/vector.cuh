// Element types, and 16-byte vectors of them. bfloat16 and float16 are raw bits: the kernels only convert them.
#pragma once

#include "intrinsics.cuh"

namespace fused_losses {

struct bfloat16 {
    static constexpr uint32_t kLowestPair = 0xff80ff80u;  // -inf, twice
    uint16_t bits;
    static __device__ __forceinline__ float2 unpack(uint32_t pair) { return from_bfloat16x2(pair); }
    static __device__ __forceinline__ uint32_t pack(float low, float high) { return to_bfloat16x2(low, high); }
    static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return max_bfloat16x2(a, b); }
    static __device__ __forceinline__ uint32_t min(uint32_t a, uint32_t b) { return min_bfloat16x2(a, b); }
};
struct float16 {
    static constexpr uint32_t kLowestPair = 0xfc00fc00u;
    uint16_t bits;
    static __device__ __forceinline__ float2 unpack(uint32_t pair) { return from_float16x2(pair); }
    static __device__ __forceinline__ uint32_t pack(float low, float high) { return to_float16x2(low, high); }
    static __device__ __forceinline__ uint32_t max(uint32_t a, uint32_t b) { return max_float16x2(a, b); }
    static __device__ __forceinline__ uint32_t min(uint32_t a, uint32_t b) { return min_float16x2(a, b); }
};

__device__ __forceinline__ float to_float(float x) { return x; }
template <class T>
__device__ __forceinline__ float to_float(T x) {
    return T::unpack(x.bits).x;
}

__device__ __forceinline__ void assign(float& to, float x) { to = x; }
template <class T>
__device__ __forceinline__ void assign(T& to, float x) {
    to.bits = static_cast<uint16_t>(T::pack(x, 0.f));
}

template <class T>
__device__ __forceinline__ T lowest() {
    T x;
    assign(x, -INFINITY);
    return x;
}

template <class T>
constexpr int kWidth = 16 / sizeof(T);  // elements per vector

template <class T>
__device__ __forceinline__ void unpack(const uint4& v, float (&x)[kWidth<T>]) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (kWidth<T> == 4) {
            x[i] = __uint_as_float(words[i]);
        } else {
            const float2 pair = T::unpack(words[i]);
            x[2 * i] = pair.x;
            x[2 * i + 1] = pair.y;
        }
    }
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&x)[kWidth<T>]) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if constexpr (kWidth<T> == 4) {
            words[i] = __float_as_uint(x[i]);
        } else {
            words[i] = T::pack(x[2 * i], x[2 * i + 1]);
        }
    }
    return {words[0], words[1], words[2], words[3]};
}

// The maximum of vectors as they lie in memory: two elements of 16 bits at a time, before they are unpacked.
template <class T>
class PackedMax {
  public:
    __device__ __forceinline__ PackedMax() : max_(lowest()) {}
    __device__ __forceinline__ explicit PackedMax(const uint4& v) : max_(of(v)) {}
    __device__ __forceinline__ void add(const uint4& v) { max_ = larger(max_, of(v)); }
    // NaN counts as nothing, unless there is nothing else.
    __device__ __forceinline__ float get() const {
        if constexpr (kWidth<T> == 4) {
            return __uint_as_float(max_);
        } else {
            const float2 pair = T::unpack(max_);
            return fmaxf(pair.x, pair.y);
        }
    }
    // That of x, too.
    __device__ __forceinline__ float with(float x) const { return fmaxf(x, get()); }

  private:
    static __device__ __forceinline__ uint32_t lowest() {
        if constexpr (kWidth<T> == 4) {
            return 0xff800000u;
        } else {
            return T::kLowestPair;
        }
    }
    static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
        if constexpr (kWidth<T> == 4) {
            return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
        } else {
            return T::max(a, b);
        }
    }

    static __device__ __forceinline__ uint32_t of(const uint4& v) { return larger(larger(v.x, v.y), larger(v.z, v.w)); }

    uint32_t max_;
};

template <class T>
class PackedMin {
  public:
    __device__ __forceinline__ explicit PackedMin(const uint4& v) : min_(of(v)) {}
    __device__ __forceinline__ void add(const uint4& v) { min_ = smaller(min_, of(v)); }
    __device__ __forceinline__ float get() const {
        if constexpr (kWidth<T> == 4) {
            return __uint_as_float(min_);
        } else {
            const float2 pair = T::unpack(min_);
            return fminf(pair.x, pair.y);
        }
    }

  private:
    static __device__ __forceinline__ uint32_t smaller(uint32_t a, uint32_t b) {
        if constexpr (kWidth<T> == 4) {
            return __float_as_uint(fminf(__uint_as_float(a), __uint_as_float(b)));
        } else {
            return T::min(a, b);
        }
    }

    static __device__ __forceinline__ uint32_t of(const uint4& v) {
        return smaller(smaller(v.x, v.y), smaller(v.z, v.w));
    }

    uint32_t min_;
};

// The 16 bytes that start `skew` bytes (1 to 15) into two neighbouring vectors.
__device__ __forceinline__ uint4 load_skewed(const uint4* p, int skew) {
    const uint4 a = load(p), b = load(p + 1);  // b is the next thread's a: a hit in L1
    uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    // Selects, as a run-time index would send w to local memory.
#pragma unroll
    for (int i = 0; i < 6; ++i) w[i] = skew & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; ++i) w[i] = skew & 4 ? w[i + 1] : w[i];
    const int bits = (skew & 3) * 8;
    return {__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits), __funnelshift_r(w[2], w[3], bits),
            __funnelshift_r(w[3], w[4], bits)};
}

}  // namespace fused_losses
