// From a logit x to z, whose softmax a row is: z = scale * level(x). Only differences of levels are ever scaled.
#pragma once

#include "intrinsics.cuh"

namespace fused_losses {

constexpr float kLog2e = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;
constexpr float kFloor = -3.402823466e+38f;

// kThreads: how many a multiprocessor holds of a kernel with terms. Of its 64K registers more would get too few each,
// and spill; a kernel without terms needs less.

// z = x / temperature
struct Identity {
    static constexpr int kThreads = 896;
    float scale;

    static __device__ __forceinline__ Identity of(float, float inverse_temperature) { return {inverse_temperature}; }
    __device__ __forceinline__ float level(float x) const { return x; }
    __device__ __forceinline__ float slope(float) const { return 1.f; }  // dz/dx times the temperature
    __device__ __forceinline__ float inverse_temperature() const { return scale; }
    __device__ __forceinline__ float exponent(float distance) const { return distance * (kLog2e * scale); }
    // A logit whose level is that many exponents from 0, as far as float32 goes.
    __device__ __forceinline__ float logit_at(float exponents) const {
        return fmaxf(exponents / (kLog2e * scale), kFloor);
    }
};

// To 1 ulp near 0 and 3 elsewhere: a softcap of 30 multiplies the error by 30, and tanh.approx has 2^-11. Near 0, where
// 1 - 2 / (e^2u + 1) cancels, a polynomial. Both are formed and one is taken: no divergence. NaN stays NaN.
__device__ __forceinline__ float accurate_tanh(float u) {
    const float size = fabsf(u), w = u * u;
    float series = -6.104945671e-03f;
    series = series * w + 2.100363933e-02f;
    series = series * w - 5.385249853e-02f;
    series = series * w + 1.333278269e-01f;
    series = series * w - 3.333332837e-01f;
    const float far = 1.f - 2.f * reciprocal_approx(exp2_approx(2.f * kLog2e * size) + 1.f);
    return size < 0.625f ? u * w * series + u : copysignf(far, u);
}

// z = softcap tanh(x / softcap) / temperature
struct Softcap {
    static constexpr int kThreads = 640;
    float scale, inverse_softcap, inverse_t;

    static __device__ __forceinline__ Softcap of(float softcap, float inverse_temperature) {
        return {softcap * inverse_temperature, 1.f / softcap, inverse_temperature};
    }
    __device__ __forceinline__ float level(float x) const { return accurate_tanh(x * inverse_softcap); }
    __device__ __forceinline__ float slope(float level) const { return 1.f - level * level; }
    __device__ __forceinline__ float inverse_temperature() const { return inverse_t; }
    __device__ __forceinline__ float exponent(float distance) const { return distance * (kLog2e * scale); }
    __device__ __forceinline__ float logit_at(float) const { return kFloor; }  // no level is beyond 1
};

}  // namespace fused_losses
