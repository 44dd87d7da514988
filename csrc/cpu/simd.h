// Sixteen lanes at a time, in the compiler's own vector types: each clone lowers them to its registers, one of 512 bits
// or four of 128.
//
// a * b + c, not fmaf: the compiler fuses it where the machine has FMA; fmaf and rint become library calls where not.
#pragma once

#include <stdint.h>
#include <string.h>

#define FL_INLINE inline __attribute__((always_inline))

// One object file serves every x86-64: the loader picks the clone that fits the machine.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define FL_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FL_CLONES
#endif

namespace fused_losses {
namespace cpu {

constexpr int64_t kLanes = 16;

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

FL_INLINE Floats all(float x) { return x - Floats{}; }
FL_INLINE Bits bits_of(Floats x) { return reinterpret_cast<Bits>(x); }
FL_INLINE Floats floats_of(Bits u) { return reinterpret_cast<Floats>(u); }
FL_INLINE Floats max_of(Floats a, Floats b) { return a > b ? a : b; }  // b where either is NaN

// The bits of sixteen 16-bit elements, widened.
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

// 2^x for x <= 0, relative error about one unit in the last place (the polynomial's own is 2e-9); 0 below 2^-126; NaN
// for NaN.
FL_INLINE Floats exp2_nonpositive(Floats x) {
    x = max_of(all(-127.f), x);
    // Adding 1.5 * 2^23 rounds to an integer n and leaves it in the low bits, here as n + 127: the exponent field of
    // 2^n. At n = -127 the field is 0, and so is the product.
    const float magic = 12582912.f + 127.f;
    const Floats shifted = x + magic;
    const Floats f = x - (shifted - magic);  // [-0.5, 0.5]
    Floats p = f * 1.53533619e-4f + 1.33988744e-3f;
    p = p * f + 9.61843736e-3f;
    p = p * f + 5.55033247e-2f;
    p = p * f + 2.40226479e-1f;
    p = p * f + 6.93147203e-1f;
    p = p * f + 1.f;
    return p * floats_of(bits_of(shifted) << 23);
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

// One element.
FL_INLINE float load_one(const float* p) { return *p; }
template <class T>
FL_INLINE float load_one(const T* p) {
    T padded[kLanes] = {*p};
    return load(padded)[0];
}
FL_INLINE void store_one(float* p, float x) { *p = x; }
template <class T>
FL_INLINE void store_one(T* p, float x) {
    T padded[kLanes];
    store(padded, all(x));
    *p = padded[0];
}

}  // namespace cpu
}  // namespace fused_losses
