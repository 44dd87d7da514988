// From a logit x to z, whose softmax a row is: z = scale * level(x). Only differences of levels are ever scaled.
#pragma once

#include "intrinsics.cuh"

namespace fused_losses {

constexpr float kLog2e = 1.44269504088896f;
constexpr float kLn2 = 0.693147180559945f;
constexpr float kFloor = -3.402823466e+38f;

constexpr float kLowestExponent = -1000.f;

// What is written once for one number and for two.
template <class X>
__device__ __forceinline__ X all_of(float a);
template <>
__device__ __forceinline__ float all_of<float>(float a) {
    return a;
}
template <>
__device__ __forceinline__ float2 all_of<float2>(float a) {
    return {a, a};
}
__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }
__device__ __forceinline__ float negative(float x) { return -x; }
__device__ __forceinline__ float2 negative(float2 x) { return {-x.x, -x.y}; }
__device__ __forceinline__ float2 exp2_approx(float2 x) { return {exp2_approx(x.x), exp2_approx(x.y)}; }

// What an element of a row is there as: its logit, a logit that is cheap (Softcap), or the level of one that is.
enum class Seen { logit, cheap_logit, cheap_level };

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
    __device__ __forceinline__ float sloped(float y, float) const { return y; }  // y temperature dz/dx
    __device__ __forceinline__ float inverse_temperature() const { return scale; }
    __device__ __forceinline__ float exponent(float distance) const { return distance * (kLog2e * scale); }
    // Where a fold's maximum starts: some exponents below 0, as far as float32 goes.
    __device__ __forceinline__ float floor(float exponents) const {
        return fmaxf(-exponents * reciprocal_approx(kLog2e * scale), kFloor);
    }
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
// What sees cheap levels only takes two at a time.
struct Softcap {
    static constexpr int kThreads = 640;
    static constexpr int kGradThreads = 512;  // as many blocks of 256, and registers for the terms
    static constexpr bool kCostly = true;
    static constexpr float kRise = 20.f;
    static constexpr float kCheap = 0.5625f;      // of |x / softcap|
    static constexpr float kCheapRest = 0.4901f;  // 1 - tanh(kCheap), and somewhat less
    static constexpr int kTerms = 5;
    float scale, inverse_t;
    float rate;      // e^2u = 2^(rate |x|), u = |x| / softcap
    float cheap_to;  // the largest |x| that is cheap; -1 where the coefficients have no room
    float unit;      // what x is multiplied by before the polynomial: 1, or where there is no room 1 / softcap
    float terms[kTerms];

    static __device__ __forceinline__ Softcap of(float softcap, float inverse_temperature) {
        constexpr float kRoom = 4096.f;
        constexpr float kTanh[kTerms] = {1.f, -3.333287537e-01f, 1.331907958e-01f, -5.256512016e-02f, 1.623291895e-02f};
        const float inverse = 1.f / softcap;
        const bool room = softcap <= kRoom && inverse <= kRoom;
        Softcap out{softcap * inverse_temperature,  inverse_temperature,  2.f * kLog2e * inverse,
                    room ? kCheap * softcap : -1.f, room ? 1.f : inverse, {}};
        float power = room ? inverse : 1.f;
        const float square = power * power;
#pragma unroll
        for (int i = 0; i < kTerms; ++i, power *= square) out.terms[i] = multiply(kTanh[i], power);
        return out;
    }
    // rest: 1 - |level|, to a few ulp, which of a level far out can't be told.
    struct Squashed {
        float level, rest;
    };
    __device__ __forceinline__ Squashed squashed(float x) const {
        const float rest = of_unknown_origin(rest_of(x));
        return {level(x, rest), rest};
    }
    __device__ __forceinline__ float level(float x) const { return level(x, rest_of(x)); }
    // y / cosh^2: of 1 - tanh^2 nothing is left far out.
    static __device__ __forceinline__ float sloped(float y, const Squashed& at) {
        return multiply(multiply(y, at.rest), 2.f - at.rest);
    }
    __device__ __forceinline__ float sloped(float y, float x) const { return sloped(y, squashed(x)); }
    // As level, up to cheap_to.
    template <class X>
    __device__ __forceinline__ X cheap_level(X x) const {
        return multiply(x, series(x, terms));
    }
    // The exponents of such levels, which are not formed for that: with their scale in the coefficients, too, the last
    // product and the difference to top are one fma. As exact: what a level's rounding was, a coefficient's is.
    class CheapExponent {
      public:
        __device__ __forceinline__ CheapExponent(const Softcap& z, float top) : top_(top) {
#pragma unroll
            for (int i = 0; i < kTerms; ++i) terms_[i] = z.exponent(z.terms[i]);
        }
        template <class X>
        __device__ __forceinline__ X operator()(X x) const {
            return multiply_add(x, series(x, terms_), all_of<X>(-top_));
        }

      private:
        float terms_[kTerms];
        const float top_;
    };
    template <class X>
    static __device__ __forceinline__ X cheap_sloped(X y, X level) {
        return multiply(y, multiply_add(negative(level), level, all_of<X>(1.f)));
    }
    __device__ __forceinline__ float inverse_temperature() const { return inverse_t; }
    __device__ __forceinline__ float exponent(float distance) const { return distance * (kLog2e * scale); }
    // Up to where exponents are that little above the one at `from`: z rises by at most x / temperature.
    __device__ __forceinline__ float little_above(float from) const {
        return from + kRise * reciprocal_approx(kLog2e * inverse_t);
    }
    __device__ __forceinline__ float floor(float) const { return kFloor; }
    // Exponents from 0 on do where no level is further away than float32 goes.
    __device__ __forceinline__ float start() const { return kLog2e * scale <= 60.f ? 0.f : kFloor; }
    template <class X>
    static __device__ __forceinline__ X finite(X exponent) {  // it is
        return exponent;
    }

  private:
    // 2 / (e^2u + 1)
    __device__ __forceinline__ float rest_of(float x) const {
        return reciprocal_approx(exp2_approx(fmaf(fabsf(x), rate, -1.f)) + 0.5f);
    }
    // To 2 ulp near 0 and 4 elsewhere: a softcap of 30 multiplies the error by 30, and tanh.approx has 2^-11. Both
    // forms are made and one is taken: no divergence. NaN stays NaN.
    __device__ __forceinline__ float level(float x, float rest) const {
        return rest >= kCheapRest ? cheap_level(multiply(x, unit)) : copysignf(1.f - rest, x);
    }
    template <class X>
    static __device__ __forceinline__ X series(X x, const float (&terms)[kTerms]) {
        const X w = multiply(x, x);
        X sum = all_of<X>(terms[kTerms - 1]);
#pragma unroll
        for (int i = kTerms - 2; i >= 0; --i) sum = multiply_add(sum, w, all_of<X>(terms[i]));
        return sum;
    }
};

}  // namespace fused_losses
