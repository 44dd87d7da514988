// Sixteen lanes at a time, in the compiler's own vector types: it lowers them to what the instruction set has, one
// register of 512 bits or four of 128.
//
// a * b + c, not fmaf: the compiler fuses it where the machine has FMA; fmaf and rint become library calls where not.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "vocab.h"

#define FL_INLINE inline __attribute__((always_inline))

namespace fused_losses {
namespace cpu {

constexpr int64_t kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

FL_INLINE Floats all(float x) { return x - Floats{}; }
FL_INLINE Bits bits_of(Floats x) { return reinterpret_cast<Bits>(x); }
FL_INLINE Floats floats_of(Bits u) { return reinterpret_cast<Floats>(u); }

FL_INLINE Floats max_of(Floats a, Floats b) {  // b where either is NaN
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);  // for the line below GCC emits a comparison and a blend
#else
    return a > b ? a : b;
#endif
}

// Sixteen 16-bit elements, widened.
FL_INLINE Bits load_halves(const void* p) {
    Halves h;
    memcpy(&h, p, sizeof h);
    return __builtin_convertvector(h, Bits);
}
FL_INLINE void store_halves(void* p, Bits u) {
    const Halves h = __builtin_convertvector(u, Halves);
    memcpy(p, &h, sizeof h);
}

FL_INLINE Floats load(const float* p) {
    Floats x;
    memcpy(&x, p, sizeof x);
    return x;
}
FL_INLINE Floats load(const BFloat16* p) { return floats_of(load_halves(p) << 16); }
FL_INLINE Floats load(const Float16* p) {
    // Exponent and mantissa moved into place are the value times 2^-112, subnormals included. The product lifts inf and
    // NaN to 2^16 and up only: give them float's all-ones exponent.
    const Bits half = load_halves(p);
    const Bits magnitude = (half & 0x7fffu) << 13;
    const Bits special = magnitude >= 0x0f800000u ? Bits{} + 0x7f800000u : Bits{};
    return floats_of(bits_of(floats_of(magnitude) * 0x1p112f) | special | ((half & 0x8000u) << 16));
}

FL_INLINE void store(float* p, Floats x) { memcpy(p, &x, sizeof x); }
FL_INLINE void store(BFloat16* p, Floats x) {  // to nearest even
    const Bits u = bits_of(x);
    const Bits rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    store_halves(p, x == x ? rounded : Bits{} + 0x7fc0u);
}
FL_INLINE void store(Float16* p, Floats x) {  // to nearest even
    const Bits u = bits_of(x), magnitude = u & 0x7fffffffu;
    // Below 2^-14, adding 0.5 rounds at the last bit of a subnormal; above, add half a unit and rebias the exponent.
    const Bits subnormal = bits_of(floats_of(magnitude) + 0.5f) - 0x3f000000u;
    const Bits normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const Bits finite = magnitude < 0x38800000u ? subnormal : normal;  // from 65520 on it is the bits of inf
    const Bits special = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
    store_halves(p, (magnitude >= 0x47800000u ? special : finite) | ((u >> 16) & 0x8000u));
}

// 2^f on [-0.5, 0.5], relative error 1.1e-7 (a float32 rounding is 6e-8).
FL_INLINE Floats exp2_polynomial(Floats f) {
    Floats p = f * 1.32647273e-3f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    return p * f + 1.f;
}

// 2^x for x <= 0. -inf gives 0, NaN gives NaN. Below 2^-126 the result is 0, with AVX-512 subnormal.
FL_INLINE Floats exp2_nonpositive(Floats x) {
#if defined(__AVX512DQ__)
    constexpr int kNearest = 8;  // to an integer, no exceptions; vreduce gives 0 for -inf
    const Floats f = _mm512_reduce_ps(x, kNearest);
    return _mm512_scalef_ps(exp2_polynomial(f), _mm512_roundscale_ps(x, kNearest));
#else
    x = max_of(all(-127.f), x);
    // Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits, here as n + 127: the exponent field of
    // 2^n. At n = -127 the field is 0, and so is the product.
    const float magic = 12582912.f + 127.f;
    const Floats shifted = x + magic;
    return exp2_polynomial(x - (shifted - magic)) * floats_of(bits_of(shifted) << 23);
#endif
}

// tanh, relative error 2e-7: a polynomial near 0, where (1 - e) / (1 + e) would cancel.
FL_INLINE Floats tanh_of(Floats x) {
    const Floats magnitude = floats_of(bits_of(x) & 0x7fffffffu), square = x * x;
    Floats p = square * -6.104945671e-3f + 2.100363933e-2f;
    p = p * square + -5.385249853e-2f;
    p = p * square + 1.333278269e-1f;
    p = p * square + -3.333332837e-1f;
    const Floats e = exp2_nonpositive(magnitude * -2.88539008f);  // e^-2|x|
    const Floats far = floats_of(bits_of((1.f - e) / (1.f + e)) | (bits_of(x) & 0x80000000u));
    return magnitude < 0.625f ? x + x * (square * p) : far;
}

// Its derivative; 1 - tanh^2 would cancel where tanh is near 1.
FL_INLINE Floats tanh_slope_of(Floats x) {
    const Floats e = exp2_nonpositive(floats_of(bits_of(x) & 0x7fffffffu) * -2.88539008f);
    return 4.f * e / ((1.f + e) * (1.f + e));
}

// The first `count` lanes of x, -inf in the others.
FL_INLINE Floats lanes_below(int64_t count, Floats x) {
    for (int64_t i = 0; i < kLanes; ++i)
        if (i >= count) x[i] = -__builtin_inff();
    return x;
}

FL_INLINE float exp2_nonpositive(float x) { return exp2_nonpositive(all(x))[0]; }

FL_INLINE float sum_of(Floats x) {
    float total = 0.f;
    for (int i = 0; i < kLanes; ++i) total += x[i];
    return total;
}
FL_INLINE float max_of(Floats x) {
    float max = x[0];
    for (int i = 1; i < kLanes; ++i) max = x[i] > max ? x[i] : max;
    return max;
}

}  // namespace cpu
}  // namespace fused_losses
