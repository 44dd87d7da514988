// What is added up over a row. e_j = 2^exponent(level_j - top) over the elements seen so far, top being the level of
// their maximum.
#pragma once

#include "transform.cuh"

namespace fused_losses {

// ---- From a level to the exponent of e_j, in two ways ---------------------------------------------------------------

// What is subtracted first costs no digits, wherever the row lies: a large common offset leaves the sums as they are.
template <class Z>
class Distance {
  public:
    __device__ __forceinline__ Distance(const Z& z, float max) : c_(z.exponent(1.f)), top_(z.level(max)) {}
    __device__ __forceinline__ float operator()(float level) const { return (level - top_) * c_; }
    // What the exponents are too large by, and what makes up for it in e_j.
    __device__ __forceinline__ float excess() const { return 0.f; }
    __device__ __forceinline__ float correction() const { return 1.f; }

  private:
    const float c_, top_;
};

// One fma instead of two instructions, for rows that are near. top is the rounded product of the maximum's level and c:
// the rounding, at most 2^-7, is in all exponents alike, known exactly, and taken out of what they add up to. Further
// out it would grow to whole exponents, and then to more than a float has.
template <class Z>
class Folded {
  public:
    static constexpr float kFar = 262144.f;

    __device__ __forceinline__ Folded(const Z& z, float max) : c_(z.exponent(1.f)), level_(z.level(max)) {
        top_ = multiply(level_, c_);
    }
    template <class X>
    __device__ __forceinline__ X operator()(X level) const {
        return multiply_add(level, all_of<X>(c_), all_of<X>(-top_));
    }
    __device__ __forceinline__ float excess() const { return fmaf(level_, c_, -top_); }
    // 2^-excess to an ulp, which ex2 is not.
    __device__ __forceinline__ float correction() const {
        const float u = -kLn2 * excess();
        return fmaf(u, fmaf(u, fmaf(u, 1.f / 6.f, 0.5f), 1.f), 1.f);
    }
    __device__ __forceinline__ float top() const { return top_; }
    __device__ __forceinline__ bool near() const { return fabsf(top_) <= kFar; }  // not of NaN

  private:
    float c_, level_, top_;
};

// Whichever is right: for what is not worth two loops.
template <class Z>
class FoldedIfNear {
  public:
    __device__ __forceinline__ FoldedIfNear(const Z& z, float max) : folded_(z, max), distance_(z, max) {}
    __device__ __forceinline__ float operator()(float level) const {
        return folded_.near() ? folded_(level) : distance_(level);
    }
    __device__ __forceinline__ float excess() const { return folded_.near() ? folded_.excess() : 0.f; }
    __device__ __forceinline__ float correction() const { return folded_.near() ? folded_.correction() : 1.f; }

  private:
    const Folded<Z> folded_;
    const Distance<Z> distance_;
};

// ---- The sums -------------------------------------------------------------------------------------------------------
//
// They begin at -0: added to it, a number stays as it is, -0 included, so that the compiler leaves out the first
// addition of each vector and chunk.

struct Sum {
    static constexpr bool kMassOnly = true;  // whether an element of -inf adds nothing
    float sum = -0.f;                        // of e_j

    // The same of the first and of the second of two elements.
    struct Pairs {
        float2 sum;

        static __device__ __forceinline__ Pairs of(float2 exponents) { return {exp2_approx(exponents)}; }
        __device__ __forceinline__ void add_pair(float2 exponents) { sum = plus(sum, exp2_approx(exponents)); }
        __device__ __forceinline__ void operator+=(const Pairs& other) { sum = plus(sum, other.sum); }
    };

    // exponent: the old top's, above the new one. factor: 2^exponent
    __device__ __forceinline__ void rescale(float, float factor) { sum *= factor; }
    template <class Z>
    __device__ __forceinline__ void add(float exponent) {
        sum += exp2_approx(exponent);
    }
    __device__ __forceinline__ void operator+=(const Sum& other) { sum += other.sum; }
};

// What losses with terms need beside the sum. All summands have one sign: nothing cancels.
struct Moments {
    static constexpr bool kMassOnly = false;
    float sum = -0.f;
    float moment = -0.f;  // of e_j log2(e_j)
    float drift = -0.f;   // of log2(e_j); -inf if a level is
    float count = 0.f;    // of elements, which drift needs when top moves; constants that the compiler adds up

    // The same of the first and of the second of two elements.
    struct Pairs {
        float2 sum, moment, drift;
        float count;

        static __device__ __forceinline__ Pairs of(float2 exponents) {
            const float2 e = exp2_approx(exponents);
            return {e, multiply(e, exponents), exponents, 2.f};
        }
        __device__ __forceinline__ void add_pair(float2 exponents) {
            const float2 e = exp2_approx(exponents);
            sum = plus(sum, e);
            moment = multiply_add(e, exponents, moment);
            drift = plus(drift, exponents);
            count += 2.f;
        }
        __device__ __forceinline__ void operator+=(const Pairs& other) {
            sum = plus(sum, other.sum);
            moment = plus(moment, other.moment);
            drift = plus(drift, other.drift);
            count += other.count;
        }
    };

    // An exponent from the floor can overflow, when all sums are 0.
    __device__ __forceinline__ void rescale(float exponent, float factor) {
        moment = factor * (moment + fmaxf(exponent, kLowestExponent) * sum);
        sum *= factor;
        drift += count * fmaxf(exponent, kFloor);
    }
    template <class Z>
    __device__ __forceinline__ void add(float exponent) {
        add<Z>(exponent, exp2_approx(exponent));
    }
    template <class Z>
    __device__ __forceinline__ void add(float exponent, float e) {
        sum += e;
        moment += e * Z::finite(exponent);
        drift += exponent;
        count += 1.f;
    }
    __device__ __forceinline__ void operator+=(const Moments& other) {
        sum += other.sum;
        moment += other.moment;
        drift += other.drift;
        count += other.count;
    }
    __device__ __forceinline__ void operator+=(const Sum::Pairs& pairs) { sum += pairs.sum.x + pairs.sum.y; }
    __device__ __forceinline__ void operator+=(const Pairs& pairs) {
        sum += pairs.sum.x + pairs.sum.y;
        moment += pairs.moment.x + pairs.moment.y;
        drift += pairs.drift.x + pairs.drift.y;
        count += pairs.count;
    }
};

// What statistics need.
struct MomentsAndSquares : Moments {
    float squares = -0.f;  // of e_j

    __device__ __forceinline__ void rescale(float exponent, float factor) {
        Moments::rescale(exponent, factor);
        squares *= factor * factor;
    }
    template <class Z>
    __device__ __forceinline__ void add(float exponent) {
        const float e = exp2_approx(exponent);
        Moments::add<Z>(exponent, e);
        squares += e * e;
    }
    __device__ __forceinline__ void operator+=(const MomentsAndSquares& other) {
        Moments::operator+=(other);
        squares += other.squares;
    }
};

// max is a running maximum of raw logits that starts at a finite floor: in an all -inf part (-inf) - (-inf) would be
// NaN. fmaxf drops a NaN, but the sums do not; +inf gives inf - inf there. Either way the row becomes NaN through them.
template <class Sums>
struct Online {
    float max = kFloor;
    Sums sums;

    // Returns the new top.
    template <class Z>
    __device__ __forceinline__ float rescale(float new_max, const Z& z) {
        const float top = z.level(new_max);
        const float exponent = z.exponent(z.level(max) - top);
        sums.rescale(exponent, exp2_approx(exponent));
        max = new_max;
        return top;
    }
    template <class Z>
    __device__ __forceinline__ void add(float x, const Z& z) {
        const float top = rescale(fmaxf(max, x), z);
        sums.template add<Z>(z.exponent(z.level(x) - top));
    }
};

}  // namespace fused_losses
