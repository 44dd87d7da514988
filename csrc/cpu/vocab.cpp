// FL_VOCAB names the table that this compilation fills: setup.py sets it with the instruction set.
#include <float.h>
#include <math.h>

#include "simd.h"

namespace fused_losses {
namespace cpu {
namespace {

// kGroup vectors at a time, so that the additions of one do not wait for those of the last.
constexpr int64_t kGroup = 4;
constexpr int64_t kStep = kGroup * kLanes;
static_assert(kBlock % kStep == 0, "a block is whole groups");

// Run body(group) on pointers to whole groups. The ragged end of a row goes through a buffer, so that there is one body
// and one rounding; -inf is what neither maximum nor sum sees.
template <class T, class Body>
FL_INLINE void for_each_group(const T* logits, int64_t n, Body body, float padding = -INFINITY) {
    int64_t j = 0;
    for (; j + kStep <= n; j += kStep) body(logits + j, j, kStep);
    if (j == n) return;
    T padded[kStep];
    for (int64_t i = 0; i < kStep; i += kLanes) store(padded + i, all(padding));
    memcpy(static_cast<void*>(padded), logits + j, (n - j) * sizeof(T));
    body(padded, j, n - j);
}

// Write whole groups where they fit, else through a buffer.
template <class T, class Value>
FL_INLINE void store_group(T* out, int64_t count, Value value) {
    if (count == kStep) {
        for (int64_t i = 0; i < kStep; i += kLanes) store(out + i, value(i));
        return;
    }
    T padded[kStep];
    for (int64_t i = 0; i < kStep; i += kLanes) store(padded + i, value(i));
    memcpy(static_cast<void*>(out), padded, count * sizeof(T));
}

// The next block, while this one computes: the loop is as long in arithmetic as in memory, and they should overlap.
template <class T>
FL_INLINE void prefetch_group(const T* group) {
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t i = 0; i < kStep; i += kLine) __builtin_prefetch(group + i);
}

template <class T>
FL_INLINE float block_max(const T* logits, int64_t n, float floor) {
    Floats max[kGroup] = {all(floor), all(floor), all(floor), all(floor)};
    for_each_group(logits, n, [&](const T* group, int64_t, int64_t) __attribute__((always_inline)) {
        for (int64_t i = 0; i < kGroup; ++i)
            max[i] = max_of(load(group + i * kLanes), max[i]);  // a NaN shows in the sum
    });
    return max_of(max_of(max_of(max[0], max[1]), max_of(max[2], max[3])));
}

template <bool keep, class T>
FL_INLINE Sum sweep(const T* logits, int64_t vocab, float c, float* exps, Reference* references) {
    Sum sum = {-FLT_MAX, 0.f};
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
        const T* block = logits + begin;
        const float max = block_max(block, n, sum.max);
        Floats total[kGroup] = {};
        for_each_group(block, n, [&](const T* group, int64_t j, int64_t count) __attribute__((always_inline)) {
            prefetch_group(block + kBlock + j);
            Floats e[kGroup];
            for (int64_t i = 0; i < kGroup; ++i) {
                e[i] = exp2_nonpositive((load(group + i * kLanes) - max) * c);
                total[i] += e[i];
            }
            if (keep)
                store_group(exps + begin + j, count,
                            [&](int64_t i) __attribute__((always_inline)) { return e[i / kLanes]; });
        });
        if (max > sum.max) sum.value *= exp2_nonpositive((sum.max - max) * c);
        sum.max = max;
        sum.value += sum_of((total[0] + total[1]) + (total[2] + total[3]));
        if (keep) references[begin / kBlock] = {max, true};
    }
    return sum;
}

template <class T>
void scaled(const float* exps, const Reference* references, Sum sum, int64_t vocab, float c, float factor, T* grad) {
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
        const float f = factor * exp2_nonpositive((references[begin / kBlock].max - sum.max) * c);
        for_each_group(exps + begin, n,
                       [&](const float* group, int64_t j, int64_t count) __attribute__((always_inline)) {
                           store_group(grad + begin + j, count,
                                       [&](int64_t i) __attribute__((always_inline)) { return f * load(group + i); });
                       });
    }
}

template <class T>
void exponentials_scaled(const T* logits, int64_t vocab, float max, float c, float factor, T* grad) {
    for_each_group(logits, vocab, [&](const T* group, int64_t j, int64_t count) __attribute__((always_inline)) {
        store_group(grad + j, count, [&](int64_t i) __attribute__((always_inline)) {
            return factor * exp2_nonpositive((load(group + i) - max) * c);
        });
    });
}

// d_j where it meets an exponential that is 0: 0 * -inf is NaN. A NaN passes.
constexpr float kLowest = -1000.f;

template <bool with_cap>
FL_INLINE Floats capped(Floats x, float softcap) {
    return with_cap ? softcap * tanh_of(x * (1.f / softcap)) : x;
}

float cap_slope(float logit, float softcap) { return softcap != 0.f ? tanh_slope_of(all(logit / softcap))[0] : 1.f; }

float capped_one(float logit, float softcap) { return softcap != 0.f ? capped<true>(all(logit), softcap)[0] : logit; }

// Sum and moment of a block relative to its reference.
template <bool with_cap, bool clamped, class T>
FL_INLINE SumAndMoment block_moment(const T* block, int64_t n, float reference, float c, float softcap, float* exps) {
    Floats total[kGroup] = {}, moment[kGroup] = {};
    for_each_group(block, n, [&](const T* group, int64_t j, int64_t count) __attribute__((always_inline)) {
        if (!clamped) prefetch_group(block + kBlock + j);
        Floats e[kGroup];
        for (int64_t i = 0; i < kGroup; ++i) {
            Floats d = (capped<with_cap>(load(group + i * kLanes), softcap) - reference) * c;
            if (with_cap && count < kStep) d = lanes_below(count - i * kLanes, d);  // a capped -inf is finite
            e[i] = exp2_nonpositive(d);
            total[i] += e[i];
            moment[i] += e[i] * (clamped ? max_of(all(kLowest), d) : d);
        }
        if (exps) store_group(exps + j, count, [&](int64_t i) __attribute__((always_inline)) { return e[i / kLanes]; });
    });
    return {{0.f, sum_of((total[0] + total[1]) + (total[2] + total[3]))},
            sum_of((moment[0] + moment[1]) + (moment[2] + moment[3]))};
}

template <bool with_cap, class T>
FL_INLINE SumAndMoment sweep_moments(const T* logits, int64_t vocab, float c, float softcap, float* exps,
                                     Reference* references) {
    SumAndMoment out = {{-FLT_MAX, 0.f}, 0.f};
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
        const T* block = logits + begin;
        float* block_exps = exps ? exps + begin : nullptr;
        const float max = block_max(block, n, out.sum.max);
        const float reference = capped<with_cap>(all(max), softcap)[0];
        SumAndMoment seen = block_moment<with_cap, false>(block, n, reference, c, softcap, block_exps);
        // 0 * -inf. Blocks that hold -inf are few, and a clamp of every element costs more than doing these twice.
        const bool infinite = seen.moment != seen.moment;
        if (infinite) seen = block_moment<with_cap, true>(block, n, reference, c, softcap, block_exps);
        if (max > out.sum.max) {
            const float lower = (capped<with_cap>(all(out.sum.max), softcap)[0] - reference) * c;
            const float distance = lower > kLowest ? lower : kLowest;
            out.moment = exp2_nonpositive(distance) * (out.moment + distance * out.sum.value);
            out.sum.value *= exp2_nonpositive(distance);
        }
        out.sum.max = max;
        out.sum.value += seen.sum.value;
        out.moment += seen.moment;
        if (references) references[begin / kBlock] = {max, infinite};
    }
    return out;
}

template <class T>
SumAndMoment moments(const T* logits, int64_t vocab, float c, float softcap, float* exps, Reference* references) {
    return softcap != 0.f ? sweep_moments<true>(logits, vocab, c, softcap, exps, references)
                          : sweep_moments<false>(logits, vocab, c, softcap, exps, references);
}

template <bool with_cap, class T>
FL_INLINE float mean_distance_of(const T* logits, int64_t vocab, float max, float softcap) {
    const float reference = capped<with_cap>(all(max), softcap)[0];
    double sum = 0.0;
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
        Floats total[kGroup] = {};
        for_each_group(
            logits + begin, n,
            [&](const T* group, int64_t, int64_t) __attribute__((always_inline)) {
                for (int64_t i = 0; i < kGroup; ++i)
                    total[i] += capped<with_cap>(load(group + i * kLanes), softcap) - reference;
            },
            max);
        sum += sum_of((total[0] + total[1]) + (total[2] + total[3]));
    }
    return static_cast<float>(sum / vocab);
}

template <class T>
float mean_distance(const T* logits, int64_t vocab, float max, float softcap) {
    return softcap != 0.f ? mean_distance_of<true>(logits, vocab, max, softcap)
                          : mean_distance_of<false>(logits, vocab, max, softcap);
}

// The exponentials are at hand: grad_j = e_j (constant + slope d_j), d_j in units of the logits.
template <bool clamped, class T>
FL_INLINE void block_combination(const T* logits, const float* exps, int64_t n, float max, float constant, float slope,
                                 float offset, T* grad) {
    for_each_group(logits, n, [&](const T* group, int64_t j, int64_t count) __attribute__((always_inline)) {
        const float* e = exps + j;
        float padded[kStep];
        if (count < kStep) e = static_cast<float*>(memcpy(padded, e, count * sizeof(float)));
        store_group(grad + j, count, [&](int64_t i) __attribute__((always_inline)) {
            const Floats d = load(group + i) - max;
            return load(e + i) * (constant + slope * (clamped ? max_of(all(-0x1p100f), d) : d)) + offset;
        });
    });
}

template <class T>
void combination_of_kept(const T* logits, const float* exps, const Reference* references, int64_t vocab, float max,
                         float c, Combination by, T* grad) {
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
        const Reference reference = references[begin / kBlock];
        const float f = exp2_nonpositive((reference.max - max) * c);
        (reference.infinite ? block_combination<true, T>
                            : block_combination<false, T>)(logits + begin, exps + begin, n, max, f * by.constant,
                                                           f * by.slope * c, by.offset, grad + begin);
    }
}

template <bool with_cap, bool clamped, class T>
FL_INLINE void block_combination_again(const T* logits, int64_t n, float top, float c, float softcap, Combination by,
                                       T* grad) {
    const float inverse_cap = with_cap ? 1.f / softcap : 0.f;
    for_each_group(logits, n, [&](const T* group, int64_t j, int64_t count) __attribute__((always_inline)) {
        store_group(grad + j, count, [&](int64_t i) __attribute__((always_inline)) {
            const Floats x = load(group + i), d = (capped<with_cap>(x, softcap) - top) * c;
            const Floats by_d = by.constant + by.slope * (clamped ? max_of(all(kLowest), d) : d);
            const Floats by_y = exp2_nonpositive(d) * by_d + by.offset;
            return with_cap ? by_y * tanh_slope_of(x * inverse_cap) : by_y;
        });
    });
}

template <bool with_cap, class T>
FL_INLINE void combination_again(const T* logits, const Reference* references, int64_t vocab, float max, float c,
                                 float softcap, Combination by, T* grad) {
    const float top = capped<with_cap>(all(max), softcap)[0];
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = vocab - begin < kBlock ? vocab - begin : kBlock;
        if (!with_cap && references && !references[begin / kBlock].infinite)
            block_combination_again<with_cap, false>(logits + begin, n, top, c, softcap, by, grad + begin);
        else
            block_combination_again<with_cap, true>(logits + begin, n, top, c, softcap, by, grad + begin);
    }
}

template <class T>
void combination(const T* logits, const float* exps, const Reference* references, int64_t vocab, float max, float c,
                 float softcap, Combination by, T* grad) {
    if (softcap != 0.f) return combination_again<true>(logits, references, vocab, max, c, softcap, by, grad);
    if (exps) return combination_of_kept(logits, exps, references, vocab, max, c, by, grad);
    return combination_again<false>(logits, references, vocab, max, c, softcap, by, grad);
}

template <class T>
void scaled_in_place(T* grad, int64_t vocab, float factor) {
    for_each_group(grad, vocab, [&](const T* group, int64_t j, int64_t count) __attribute__((always_inline)) {
        store_group(grad + j, count, [&](int64_t i) __attribute__((always_inline)) {
            const Floats x = load(group + i);
            return x == 0.f ? x : factor * x;  // a masked token's gradient stays 0 for an infinite factor, too
        });
    });
}

template <class T>
struct Row {
    static Sum exponentials(const T* logits, int64_t vocab, float c, float* exps, Reference* references) {
        return sweep<true>(logits, vocab, c, exps, references);
    }
    static Sum sum_of_exponentials(const T* logits, int64_t vocab, float c) {
        return sweep<false>(logits, vocab, c, static_cast<float*>(nullptr), static_cast<Reference*>(nullptr));
    }
    static float load_one(const T* element) {
        T padded[kLanes] = {*element};
        return load(padded)[0];
    }
    static void store_one(T* element, float value) {
        T padded[kLanes];
        store(padded, all(value));
        *element = padded[0];
    }
    static constexpr RowFunctions<T> functions() {
        return {exponentials,   sum_of_exponentials, scaled,    exponentials_scaled, moments<T>, mean_distance<T>,
                combination<T>, capped_one,          cap_slope, scaled_in_place,     load_one,   store_one};
    }
};

}  // namespace

const VocabFunctions FL_VOCAB = {Row<float>::functions(), Row<BFloat16>::functions(), Row<Float16>::functions()};

}  // namespace cpu
}  // namespace fused_losses
