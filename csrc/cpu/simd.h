// One register at a time, in the compiler's own vector types. Not more: a vector that no register holds lives in
// memory, and AVX2 then takes ten times as long.
//
// a * b + c, not fmaf: the compiler fuses it where the machine has FMA; fmaf and rint become library calls where not.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "vocab.h"

#define FL_INLINE inline __attribute__((always_inline))

namespace fused_losses {
namespace cpu {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
#else
constexpr int64_t kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Bits __attribute__((vector_size(4 * kLanes)));
typedef uint16_t Halves __attribute__((vector_size(2 * kLanes)));

FL_INLINE Floats all(float x) { return x - Floats{}; }
FL_INLINE Bits bits_of(Floats x) { return reinterpret_cast<Bits>(x); }
FL_INLINE Floats floats_of(Bits u) { return reinterpret_cast<Floats>(u); }

// b where either is NaN. For the plain expression GCC emits a comparison and a blend.
FL_INLINE Floats max_of(Floats a, Floats b) {
#if defined(__AVX512F__)
    return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
    return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
    return _mm_max_ps(a, b);
#else
    return a > b ? a : b;
#endif
}

// 16-bit elements, widened.
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
FL_INLINE Floats load(const Float16* p) {
    // Exponent and mantissa moved into place are the value times 2^-112, subnormals included. The product lifts inf and
    // NaN to 2^16 and up only: give them float's all-ones exponent.
    const Bits half = load_halves(p);
    const Bits magnitude = (half & 0x7fffu) << 13;
    const Bits special = magnitude >= 0x0f800000u ? Bits{} + 0x7f800000u : Bits{};
    return floats_of(bits_of(floats_of(magnitude) * 0x1p112f) | special | ((half & 0x8000u) << 16));
}

FL_INLINE void store(float* p, Floats x) { memcpy(p, &x, sizeof x); }
FL_INLINE void store(Float16* p, Floats x) {  // to nearest even
    const Bits u = bits_of(x), magnitude = u & 0x7fffffffu;
    // Below 2^-14, adding 0.5 rounds at the last bit of a subnormal; above, add half a unit and rebias the exponent.
    const Bits subnormal = bits_of(floats_of(magnitude) + 0.5f) - 0x3f000000u;
    const Bits normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
    const Bits finite = magnitude < 0x38800000u ? subnormal : normal;  // from 65520 on it is the bits of inf
    const Bits special = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : Bits{} + 0x7c00u;
    store_halves(p, (magnitude >= 0x47800000u ? special : finite) | ((u >> 16) & 0x8000u));
}

// Several registers at a time, so that the additions of one do not wait for those of the last.
constexpr int64_t kGroup = 4;
constexpr int64_t kStep = kGroup * kLanes;

struct Group {
    Floats of[kGroup];
};

FL_INLINE Group group_of(float x) { return {{all(x), all(x), all(x), all(x)}}; }

template <class T>
FL_INLINE Group load_group(const T* p) {
    Group x;
    for (int64_t i = 0; i < kGroup; ++i) x.of[i] = load(p + i * kLanes);
    return x;
}

template <class T>
FL_INLINE void store_group(T* p, const Group& x) {
    for (int64_t i = 0; i < kGroup; ++i) store(p + i * kLanes, x.of[i]);
}

// Of bfloat16 two registers share out the even and the odd elements: a shift and a mask are cheaper than widening. Only
// what is stored as bfloat16 again gets the order of memory back.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the even element is the lower half");
FL_INLINE Group load_group(const BFloat16* p) {
    Group x;
    for (int64_t i = 0; i < kGroup; i += 2) {
        Bits pairs;
        memcpy(&pairs, p + i * kLanes, sizeof pairs);
        x.of[i] = floats_of(pairs << 16);
        x.of[i + 1] = floats_of(pairs & 0xffff0000u);
    }
    return x;
}

FL_INLINE Bits rounded_to_bfloat16(Floats x) {  // to nearest even; in the upper half
    const Bits u = bits_of(x);
    return x == x ? u + 0x7fffu + ((u >> 16) & 1u) : Bits{} + 0x7fc00000u;
}

FL_INLINE void store_group(BFloat16* p, const Group& x) {
    for (int64_t i = 0; i < kGroup; i += 2) {
        const Bits even = rounded_to_bfloat16(x.of[i]), odd = rounded_to_bfloat16(x.of[i + 1]);
        const Bits pairs = (even >> 16) | (odd & 0xffff0000u);
        memcpy(static_cast<void*>(p + i * kLanes), &pairs, sizeof pairs);
    }
}

// Below -126.5, 2^x is taken to be 0; and x itself stays finite, so that its product with 0 is 0 for a logit of -inf. A
// NaN passes.
constexpr float kLowest = -127.f;
FL_INLINE Floats bounded(Floats x) { return max_of(all(kLowest), x); }

// 2^x for x in [kLowest, 0], relative error 1.8e-7 (a float32 rounding is 6e-8); NaN for NaN.
FL_INLINE Floats exp2_bounded(Floats x) {
    // Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits, here as n + 127: the exponent field of
    // 2^n. At kLowest the field is 0, and so is the product.
    const float magic = 12582912.f + 127.f;
    const Floats shifted = x + magic;
    const Floats f = x - (shifted - magic);
    Floats p = f * 1.32647273e-3f + 9.67151299e-3f;
    p = p * f + 5.55073358e-2f;
    p = p * f + 2.40222424e-1f;
    p = p * f + 6.93147004e-1f;
    p = p * f + 1.f;
    return p * floats_of(bits_of(shifted) << 23);
}

// 2^x for x <= 0; -inf gives 0.
FL_INLINE Floats exp2_nonpositive(Floats x) { return exp2_bounded(bounded(x)); }

// Whether any lane of x is above the bound.
FL_INLINE bool any_above(Floats x, float bound) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask(x, all(bound), _CMP_GT_OQ) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps(x, all(bound), _CMP_GT_OQ)) != 0;
#elif defined(__SSE2__)
    return _mm_movemask_ps(_mm_cmpgt_ps(x, all(bound))) != 0;
#else
    bool any = false;
    for (int64_t i = 0; i < kLanes; ++i) any |= x[i] > bound;
    return any;
#endif
}

struct Tanh {
    Group value, slope;
};

// tanh, relative error 2.5e-7, and its derivative: near 0 a polynomial, where (1 - e) / (1 + e) would cancel; far from
// it not 1 - tanh^2, which would. Logits are seldom so large as to need the second.
FL_INLINE Tanh tanh_of(const Group& x) {
    constexpr float kSmall = 0.625f;
    Tanh out;
    Group magnitude;
    for (int64_t i = 0; i < kGroup; ++i) {
        magnitude.of[i] = floats_of(bits_of(x.of[i]) & 0x7fffffffu);
        const Floats square = x.of[i] * x.of[i];
        Floats p = square * -6.104945671e-3f + 2.100363933e-2f;
        p = p * square + -5.385249853e-2f;
        p = p * square + 1.333278269e-1f;
        p = p * square + -3.333332837e-1f;
        out.value.of[i] = x.of[i] + x.of[i] * (square * p);
        out.slope.of[i] = 1.f - out.value.of[i] * out.value.of[i];
    }
    const Floats largest = max_of(max_of(magnitude.of[0], magnitude.of[1]), max_of(magnitude.of[2], magnitude.of[3]));
    if (!any_above(largest, kSmall)) return out;  // nor is a NaN that hides another lane's: its row is NaN
    for (int64_t i = 0; i < kGroup; ++i) {
        const Floats e = exp2_nonpositive(magnitude.of[i] * -2.88539008f);  // e^-2|x|
        const Floats inverse = 1.f / (1.f + e);
        const Floats value = floats_of(bits_of((1.f - e) * inverse) | (bits_of(x.of[i]) & 0x80000000u));
        out.value.of[i] = magnitude.of[i] > kSmall ? value : out.value.of[i];
        out.slope.of[i] = magnitude.of[i] > kSmall ? 4.f * e * (inverse * inverse) : out.slope.of[i];
    }
    return out;
}

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
