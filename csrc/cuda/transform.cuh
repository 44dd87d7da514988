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
    static constexpr int kGradThreads = 896;
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

// kCostly: a level is, but less so near 0, where most logits are. The engine on chip looks for chunks that are cheap as
// a whole, and does without the level of a maximum that can't have risen by more than kRise exponents.
//
// z = softcap tanh(x / softcap) / temperature
//
// Near 0, where 1 - 2 / (e^2u + 1) cancels, tanh(x / softcap) is x times a polynomial of x^2, to 2 ulp beside those of
// 1 / softcap. It has the softcap in its coefficients, where float32 has room for its ninth power: an instruction less
// per element than one of x / softcap. Roundings are spelled out, so that a level is the same wherever it is formed.
struct Softcap {
    static constexpr int kThreads = 640;
    static constexpr int kGradThreads = 512;  // as many blocks of 256, and registers for the terms
    static constexpr bool kCostly = true;
    static constexpr float kRise = 20.f;
    static constexpr float kCheap = 0.5625f;  // of |x / softcap|
    static constexpr int kTerms = 5;
    float scale, inverse_softcap, inverse_t;
    float unit;  // what x is multiplied by before the polynomial: 1, or where there is no room 1 / softcap
    float terms[kTerms];

    static __device__ __forceinline__ Softcap of(float softcap, float inverse_temperature) {
        constexpr float kRoom = 4096.f;
        constexpr float kTanh[kTerms] = {1.f, -3.333287537e-01f, 1.331907958e-01f, -5.256512016e-02f, 1.623291895e-02f};
        const float inverse = 1.f / softcap;
        const bool room = softcap <= kRoom && inverse <= kRoom;
        Softcap out{softcap * inverse_temperature, inverse, inverse_temperature, room ? 1.f : inverse, {}};
        float power = room ? inverse : 1.f;
        const float square = power * power;
#pragma unroll
        for (int i = 0; i < kTerms; ++i, power *= square) out.terms[i] = multiply(kTanh[i], power);
        return out;
    }
    // To 2 ulp near 0 and 4 elsewhere: a softcap of 30 multiplies the error by 30, and tanh.approx has 2^-11. Both
    // forms are made and one is taken: no divergence. NaN stays NaN.
    __device__ __forceinline__ float level(float x) const {
        const float size = fabsf(multiply(x, inverse_softcap));
        const float far = 1.f - 2.f * reciprocal_approx(exp2_approx(2.f * kLog2e * size) + 1.f);
        return size <= kCheap ? cheap_level(multiply(x, unit)) : copysignf(far, x);
    }
    // As level, where cheap says so.
    __device__ __forceinline__ float cheap_level(float x) const {
        const float w = multiply(x, x);
        const float series = fmaf(fmaf(fmaf(fmaf(terms[4], w, terms[3]), w, terms[2]), w, terms[1]), w, terms[0]);
        return multiply(x, series);
    }
    __device__ __forceinline__ bool cheap(float least, float most) const {
        return unit == 1.f && multiply(fmaxf(most, -least), inverse_softcap) <= kCheap;
    }
    __device__ __forceinline__ float slope(float level) const { return 1.f - level * level; }
    __device__ __forceinline__ float inverse_temperature() const { return inverse_t; }
    __device__ __forceinline__ float exponent(float distance) const { return distance * (kLog2e * scale); }
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
