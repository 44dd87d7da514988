// From a logit x to z, whose softmax a row is: z = scale * level(x). Only differences of levels are ever scaled.
#pragma once

#include "intrinsics.cuh"

namespace fused_losses {

constexpr float kLog2e = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;
constexpr float kFloor = -3.402823466e+38f;

constexpr float kLowestExponent = -1000.f;

// kThreads: how many a multiprocessor holds of a kernel with terms. Of its 64K registers more would get too few each,
// and spill; a kernel without terms needs less.

// z = x / temperature
struct Identity {
    static constexpr int kThreads = 896;
    static constexpr bool kCostly = false;
    float scale;

    static __device__ __forceinline__ Identity of(float, float inverse_temperature) { return {inverse_temperature}; }
    __device__ __forceinline__ float level(float x) const { return x; }
    __device__ __forceinline__ float slope(float) const { return 1.f; }  // dz/dx times the temperature
    __device__ __forceinline__ float inverse_temperature() const { return scale; }
    __device__ __forceinline__ float exponent(float distance) const { return distance * (kLog2e * scale); }
    // Where a fold's maximum starts: some exponents below 0, as far as float32 goes.
    __device__ __forceinline__ float floor(float exponents) const {
        return fmaxf(-exponents * reciprocal_approx(kLog2e * scale), kFloor);
    }
    __device__ __forceinline__ float cheap_level(float x) const { return x; }
    // Of an exponent that meets e_j = 0: 0 * -inf would be NaN. A NaN is lost here, but not in e_j.
    static __device__ __forceinline__ float finite(float exponent) { return fmaxf(exponent, kLowestExponent); }
};

// tanh near 0, where 1 - 2 / (e^2u + 1) cancels, to 2 ulp: a polynomial, whose roundings are spelled out so that it is
// the same number wherever it is formed.
constexpr float kCheap = 0.5625f;
__device__ __forceinline__ float cheap_tanh(float u) {
    const float w = u * u;
    const float series =
        fmaf(fmaf(fmaf(1.623291895e-02f, w, -5.256512016e-02f), w, 1.331907958e-01f), w, -3.333287537e-01f);
    return fmaf(multiply(u, w), series, u);
}

// To 2 ulp near 0 and 4 elsewhere: a softcap of 30 multiplies the error by 30, and tanh.approx has 2^-11. Both forms
// are made and one is taken: no divergence. NaN stays NaN.
__device__ __forceinline__ float accurate_tanh(float u) {
    const float size = fabsf(u);
    const float far = 1.f - 2.f * reciprocal_approx(exp2_approx(2.f * kLog2e * size) + 1.f);
    return size <= kCheap ? cheap_tanh(u) : copysignf(far, u);
}

// kCostly: a level is, but less so near 0, where most logits are. The engine on chip looks for chunks that are cheap as
// a whole, and does without the level of a maximum that can't have risen by more than kRise exponents.
//
// z = softcap tanh(x / softcap) / temperature
struct Softcap {
    static constexpr int kThreads = 640;
    static constexpr bool kCostly = true;
    static constexpr float kRise = 20.f;
    float scale, inverse_softcap, inverse_t;

    static __device__ __forceinline__ Softcap of(float softcap, float inverse_temperature) {
        return {softcap * inverse_temperature, 1.f / softcap, inverse_temperature};
    }
    __device__ __forceinline__ float level(float x) const { return accurate_tanh(multiply(x, inverse_softcap)); }
    __device__ __forceinline__ float slope(float level) const { return 1.f - level * level; }
    __device__ __forceinline__ float inverse_temperature() const { return inverse_t; }
    __device__ __forceinline__ float exponent(float distance) const { return distance * (kLog2e * scale); }
    __device__ __forceinline__ float cheap_level(float x) const { return cheap_tanh(multiply(x, inverse_softcap)); }
    __device__ __forceinline__ bool cheap(float least, float most) const {
        return multiply(fmaxf(most, -least), inverse_softcap) <= kCheap;
    }
    // Whether the exponent at x is that little above the one at `from`: a level rises by at most x / softcap.
    __device__ __forceinline__ bool little_above(float x, float from) const {
        return (x - from) * inverse_softcap * (kLog2e * scale) <= kRise;
    }
    __device__ __forceinline__ float floor(float) const { return kFloor; }
    // Exponents from 0 on do where no level is further away than float32 goes.
    __device__ __forceinline__ float start() const { return kLog2e * scale <= 60.f ? 0.f : kFloor; }
    static __device__ __forceinline__ float finite(float exponent) { return exponent; }  // it is
};

}  // namespace fused_losses
