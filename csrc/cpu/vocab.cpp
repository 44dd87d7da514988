// FL_VOCAB names the table that this compilation fills: setup.py sets it with the instruction set.
#include <float.h>
#include <math.h>

#include <type_traits>

#include "simd.h"

namespace fused_losses {
namespace cpu {
namespace {

static_assert(kBlock % kStep == 0 && kWhole % kStep == 0 && kReferences >= kLanes, "for every instruction set");

// ---- Walking a row -------------------------------------------------------------------------------

FL_INLINE int64_t block_size(int64_t vocab, int64_t begin) { return vocab - begin < kBlock ? vocab - begin : kBlock; }

FL_INLINE bool holds(int64_t size, int64_t index) { return static_cast<uint64_t>(index) < static_cast<uint64_t>(size); }

// Which of a group's elements the lanes of its register i hold; load_group of simd.h.
template <class T>
FL_INLINE Bits places(int64_t i) {
    Bits lanes = {};
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] = lane;
    const uint32_t first = i * kLanes;
    if (std::is_same<T, BFloat16>::value) return 2 * lanes + static_cast<uint32_t>(i % 2 ? first - kLanes + 1 : first);
    return lanes + first;
}

template <class T>
FL_INLINE Group without(Group x, int64_t left_out) {
    for (int64_t i = 0; i < kGroup; ++i)
        x.of[i] = places<T>(i) == static_cast<uint32_t>(left_out) ? all(-INFINITY) : x.of[i];
    return x;
}

template <class T>
FL_INLINE Group load_first(const T* row, int64_t count, float padding) {
    if (count == kStep) return load_group(row);
    T padded[kStep];
    store_group(padded, group_of(padding));
    memcpy(static_cast<void*>(padded), row, count * sizeof(T));
    return load_group(padded);
}

// Run body(group, where it begins, how many of its elements are the row's). The ragged end is padded, so that there is
// one body and one rounding. What is left out is -inf, which neither maximum nor sum sees.
template <class T, class Body>
FL_INLINE void for_each_group(const T* row, int64_t n, Body body, float padding = -INFINITY, int64_t left_out = kNone) {
    const int64_t whole = n - n % kStep;
    int64_t j = 0, stop = holds(n, left_out) ? left_out - left_out % kStep : whole;
    for (;; stop = whole) {
        for (; j < stop; j += kStep) body(load_group(row + j), j, kStep);
        if (j >= n) return;
        const int64_t count = n - j < kStep ? n - j : kStep;
        const Group x = load_first(row + j, count, padding);
        body(holds(kStep, left_out - j) ? without<T>(x, left_out - j) : x, j, count);
        j += kStep;
    }
}

template <class T>
FL_INLINE void store_first(T* out, int64_t count, const Group& x) {
    if (count == kStep) return store_group(out, x);
    T padded[kStep];
    store_group(padded, x);
    memcpy(static_cast<void*>(out), padded, count * sizeof(T));
}

// Exponentials lie as they lay in registers: for float32 that is the order of the row, which they may be written over;
// for 16 bits they are whole groups of a scratch row.
template <class T>
FL_INLINE void keep_group(float* exps, int64_t count, const Group& e) {
    store_first(exps, sizeof(T) == sizeof(float) ? count : kStep, e);
}

template <class T>
FL_INLINE Group kept_group(const float* exps, int64_t count) {
    if (sizeof(T) != sizeof(float) || count == kStep) return load_group(exps);
    float padded[kStep] = {};
    memcpy(padded, exps, count * sizeof(float));
    return load_group(padded);
}

// 0 where a group has an element that counts, -inf where it has padding or what is left out.
template <class T>
FL_INLINE Group counted(int64_t count, int64_t left_out) {
    Group out;
    for (int64_t i = 0; i < kGroup; ++i)
        out.of[i] = places<T>(i) < static_cast<uint32_t>(count) ? all(0.f) : all(-INFINITY);
    return holds(kStep, left_out) ? without<T>(out, left_out) : out;
}

template <class T>
FL_INLINE void prefetch_group(const T* group, int64_t distance, bool far) {
    constexpr int64_t kLine = 64 / sizeof(T);
    const T* ahead = group + distance / static_cast<int64_t>(sizeof(T));
    for (int64_t i = 0; i < kStep; i += kLine)
        far ? __builtin_prefetch(ahead + i, 0, 2) : __builtin_prefetch(ahead + i);
}

// ---- Reading a row -------------------------------------------------------------------------------

template <bool with_cap>
FL_INLINE Tanh levels(const Group& x, float inverse_cap) {
    if (!with_cap) return {x, {}};
    Group scaled;
    for (int64_t i = 0; i < kGroup; ++i) scaled.of[i] = x.of[i] * inverse_cap;
    return tanh_of(scaled);
}

template <bool with_cap>
FL_INLINE Floats level(Floats x, float inverse_cap) {
    return levels<with_cap>({{x, x, x, x}}, inverse_cap).value.of[0];
}

float level_of(float logit, float softcap) {
    return softcap != 0.f ? levels<true>(group_of(logit), 1.f / softcap).value.of[0][0] : logit;
}

float level_slope_of(float logit, float softcap) {
    return softcap != 0.f ? levels<true>(group_of(logit), 1.f / softcap).slope.of[0][0] : 1.f;
}

FL_INLINE Floats merged_sum(const Group& x) { return (x.of[0] + x.of[1]) + (x.of[2] + x.of[3]); }

FL_INLINE Floats merged_max(const Group& x) { return max_of(max_of(x.of[0], x.of[1]), max_of(x.of[2], x.of[3])); }

// Of a lane, not of the row: no lane has to wait for the others.
template <class T>
FL_INLINE Floats lane_max(const T* logits, int64_t n, int64_t left_out, Floats floor) {
    Group max = {floor, floor, floor, floor};
    for_each_group(
        logits, n,
        [&](const Group& x, int64_t, int64_t) __attribute__((always_inline)) {
            for (int64_t i = 0; i < kGroup; ++i) max.of[i] = max_of(x.of[i], max.of[i]);  // a NaN shows in the sum
        },
        -INFINITY, left_out);
    return merged_max(max);
}

// Sums relative to a reference for each lane.
struct LaneSums {
    Floats sum, moment, squares, drift;
    Floats count;  // of what the drift has summed

    // The same relative to another, the old one less the new being distance, not above 0.
    FL_INLINE void move(Floats distance, float c) {
        const Floats exponent = bounded(distance * c), factor = exp2_bounded(exponent);
        moment = factor * (moment + exponent * sum);
        sum *= factor;
        squares *= factor * factor;
        drift += count > 0.f ? count * distance : Floats{};  // of nothing it may be infinite
    }
};

// How many of n elements each lane holds.
template <class T>
FL_INLINE Floats held(int64_t n, int64_t left_out) {
    Floats lanes = all(static_cast<float>(n / kStep * kGroup));
    if (n % kStep != 0)
        for (int64_t i = 0; i < kGroup; ++i)
            lanes += places<T>(i) < static_cast<uint32_t>(n % kStep) ? all(1.f) : Floats{};
    if (holds(n, left_out))
        for (int64_t i = 0; i < kGroup; ++i)
            lanes -= places<T>(i) == static_cast<uint32_t>(left_out % kStep) ? all(1.f) : Floats{};
    return lanes;
}

// The loop is as long in arithmetic as in memory, and they should overlap: ask for what comes next. Far ahead only
// where nothing else goes to memory, else the two get in each other's way.
constexpr int64_t kNear = 2048, kFar = 8192;  // bytes

// What a sweep sums.
enum class Sums { exponentials, moments, statistics };

template <Sums sums, bool with_cap, bool keep, class T>
FL_INLINE LaneSums block_sums(const T* block, int64_t n, int64_t left_out, Floats reference, float c, float inverse_cap,
                              float* exps, int64_t far) {
    Group total = {}, moment = {};
    Floats squares = {}, drift = {};  // one register each: more would spill, and their additions wait for nobody
    for_each_group(
        block, n,
        [&](const Group& x, int64_t j, int64_t count) __attribute__((always_inline)) {
            prefetch_group(block + j, kNear, false);
            if (far) prefetch_group(block + j, far, true);
            const Group y = levels<with_cap>(x, inverse_cap).value;
            Group distance, d, e;
            for (int64_t i = 0; i < kGroup; ++i) {
                distance.of[i] = y.of[i] - reference;
                d.of[i] = distance.of[i] * c;
            }
            // a capped -inf is finite, and one that is not would be in the drift
            if ((with_cap || sums == Sums::statistics) && (count < kStep || holds(kStep, left_out - j))) {
                const Group mask = counted<T>(count, left_out - j);
                for (int64_t i = 0; i < kGroup; ++i) {
                    d.of[i] += mask.of[i];
                    distance.of[i] = mask.of[i] == 0.f ? distance.of[i] : Floats{};
                }
            }
            if (sums == Sums::statistics) drift += merged_sum(distance);
            for (int64_t i = 0; i < kGroup; ++i) {
                d.of[i] = bounded(d.of[i]);
                e.of[i] = exp2_bounded(d.of[i]);
                total.of[i] += e.of[i];
                if (sums != Sums::exponentials) moment.of[i] += e.of[i] * d.of[i];
                if (sums == Sums::statistics) squares += e.of[i] * e.of[i];
            }
            if (keep) keep_group<T>(exps + j, count, e);
        },
        -INFINITY, left_out);
    const Floats count = sums == Sums::statistics ? held<T>(n, left_out) : Floats{};
    return {merged_sum(total), merged_sum(moment), squares, drift, count};
}

template <Sums asked, bool with_cap, bool keep, class T>
FL_INLINE SumsOfStatistics sweep(const T* logits, int64_t vocab, int64_t left_out, float c, float inverse_cap,
                                 Kept kept) {
    Floats max = all(-FLT_MAX), reference = level<with_cap>(max, inverse_cap);
    LaneSums sums = {};
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t n = block_size(vocab, begin), far = keep && !kept.in_cache ? 0 : kFar;
        const T* block = logits + begin;
        max = lane_max(block, n, left_out - begin, max);
        const Floats lower = reference;
        reference = level<with_cap>(max, inverse_cap);
        sums.move(lower - reference, c);
        const LaneSums seen = block_sums<asked, with_cap, keep>(block, n, left_out - begin, reference, c, inverse_cap,
                                                                keep ? kept.exps + begin : nullptr, far);
        sums.sum += seen.sum;
        sums.moment += seen.moment;
        sums.squares += seen.squares;
        sums.drift += seen.drift;
        sums.count += seen.count;
        if (keep) store(kept.references + begin / kBlock * kReferences, max);
    }
    const float top = max_of(max);
    sums.move(reference - level<with_cap>(all(top), inverse_cap), c);
    return {{top, sum_of(sums.sum)}, sum_of(sums.moment), sum_of(sums.squares), sum_of(sums.drift)};
}

template <class T>
Sum exponentials(const T* logits, int64_t vocab, int64_t left_out, float c, Kept kept) {
    return (kept.exps ? sweep<Sums::exponentials, false, true>(logits, vocab, left_out, c, 0.f, kept)
                      : sweep<Sums::exponentials, false, false>(logits, vocab, left_out, c, 0.f, kept))
        .sum;
}

template <class T>
SumAndMoment moments(const T* logits, int64_t vocab, int64_t left_out, float c, float softcap, Kept kept) {
    const SumsOfStatistics sums =
        softcap != 0.f ? sweep<Sums::moments, true, false>(logits, vocab, left_out, c, 1.f / softcap, kept)
        : kept.exps    ? sweep<Sums::moments, false, true>(logits, vocab, left_out, c, 0.f, kept)
                       : sweep<Sums::moments, false, false>(logits, vocab, left_out, c, 0.f, kept);
    return {sums.sum, sums.moment};
}

template <class T>
SumsOfStatistics statistics(const T* logits, int64_t vocab, int64_t left_out, float c, float softcap) {
    constexpr Kept kNowhere = {nullptr, nullptr, true};
    return softcap != 0.f ? sweep<Sums::statistics, true, false>(logits, vocab, left_out, c, 1.f / softcap, kNowhere)
                          : sweep<Sums::statistics, false, false>(logits, vocab, left_out, c, 0.f, kNowhere);
}

template <class T>
float largest(const T* logits, int64_t n) {
    return max_of(lane_max(logits, n, kNone, all(-INFINITY)));
}

template <bool with_cap, class T>
FL_INLINE float drift_of(const T* logits, int64_t vocab, float max, float inverse_cap) {
    const float reference = level<with_cap>(all(max), inverse_cap)[0];
    double sum = 0.0;
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        Group total = {};
        for_each_group(
            logits + begin, block_size(vocab, begin),
            [&](const Group& x, int64_t, int64_t) __attribute__((always_inline)) {
                const Group y = levels<with_cap>(x, inverse_cap).value;
                for (int64_t i = 0; i < kGroup; ++i) total.of[i] += y.of[i] - reference;
            },
            max);
        sum += sum_of(merged_sum(total));
    }
    return static_cast<float>(sum);
}

template <class T>
float drift(const T* logits, int64_t vocab, float max, float softcap) {
    return softcap != 0.f ? drift_of<true>(logits, vocab, max, 1.f / softcap)
                          : drift_of<false>(logits, vocab, max, 0.f);
}

// ---- Writing its gradient ------------------------------------------------------------------------

// What completes the exponentials of a block.
FL_INLINE Floats completion(Kept kept, int64_t begin, float max, float c) {
    return exp2_nonpositive((load(kept.references + begin / kBlock * kReferences) - max) * c);
}

template <class T>
void scaled(Kept kept, int64_t vocab, float max, float c, float factor, T* grad) {
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const int64_t end = begin + block_size(vocab, begin);
        const Floats f = factor * completion(kept, begin, max, c);
        for (int64_t j = begin; j < end; j += kStep) {
            const int64_t count = end - j < kStep ? end - j : kStep;
            Group x = kept_group<T>(kept.exps + j, count);
            for (int64_t i = 0; i < kGroup; ++i) x.of[i] *= f;
            store_first(grad + j, count, x);
        }
    }
}

template <class T>
void exponentials_scaled(const T* logits, int64_t vocab, float max, float c, float factor, T* grad) {
    for_each_group(logits, vocab, [&](const Group& x, int64_t j, int64_t count) __attribute__((always_inline)) {
        Group out;
        for (int64_t i = 0; i < kGroup; ++i) out.of[i] = factor * exp2_nonpositive((x.of[i] - max) * c);
        store_first(grad + j, count, out);
    });
}

// grad_j = e_j (constant + slope d_j) + offset with the exponentials at hand.
template <class T>
void combination_of_kept(const T* logits, Kept kept, int64_t vocab, float max, float c, Combination by, T* grad) {
    for (int64_t begin = 0; begin < vocab; begin += kBlock) {
        const Floats f = completion(kept, begin, max, c), constant = f * by.constant, slope = f * by.slope;
        for_each_group(logits + begin, block_size(vocab, begin),
                       [&](const Group& x, int64_t j, int64_t count) __attribute__((always_inline)) {
                           Group out = kept_group<T>(kept.exps + begin + j, count);
                           for (int64_t i = 0; i < kGroup; ++i) {
                               const Floats d = bounded((x.of[i] - max) * c);
                               out.of[i] = out.of[i] * (constant + slope * d) + by.offset;
                           }
                           store_first(grad + begin + j, count, out);
                       });
    }
}

template <bool with_cap, class T>
FL_INLINE void combination_again(const T* logits, int64_t vocab, float max, float c, float inverse_cap, Combination by,
                                 T* grad) {
    const float top = level<with_cap>(all(max), inverse_cap)[0];
    for_each_group(logits, vocab, [&](const Group& x, int64_t j, int64_t count) __attribute__((always_inline)) {
        const Tanh y = levels<with_cap>(x, inverse_cap);
        Group out;
        for (int64_t i = 0; i < kGroup; ++i) {
            const Floats d = bounded((y.value.of[i] - top) * c);
            out.of[i] = exp2_bounded(d) * (by.constant + by.slope * d) + by.offset;
            if (with_cap) out.of[i] *= y.slope.of[i];
        }
        store_first(grad + j, count, out);
    });
}

template <class T>
void combination(const T* logits, Kept kept, int64_t vocab, float max, float c, float softcap, Combination by,
                 T* grad) {
    if (softcap != 0.f) return combination_again<true>(logits, vocab, max, c, 1.f / softcap, by, grad);
    if (kept.exps) return combination_of_kept(logits, kept, vocab, max, c, by, grad);
    return combination_again<false>(logits, vocab, max, c, 0.f, by, grad);
}

template <class T>
void scaled_in_place(T* grad, int64_t vocab, float factor) {
    for_each_group(grad, vocab, [&](const Group& x, int64_t j, int64_t count) __attribute__((always_inline)) {
        Group out;
        for (int64_t i = 0; i < kGroup; ++i)  // a masked token's gradient stays 0 for an infinite factor, too
            out.of[i] = x.of[i] == 0.f ? x.of[i] : factor * x.of[i];
        store_first(grad + j, count, out);
    });
}

template <class T>
struct Row {
    static float load_one(const T* element) {
        T padded[kStep] = {*element};
        return load_group(padded).of[0][0];
    }
    static void store_one(T* element, float value) {
        T padded[kStep];
        store_group(padded, group_of(value));
        *element = padded[0];
    }
    static constexpr RowFunctions<T> functions() {
        return {
            exponentials<T>, scaled<T>, exponentials_scaled<T>, moments<T>,         statistics<T>, largest<T>, drift<T>,
            combination<T>,  level_of,  level_slope_of,         scaled_in_place<T>, load_one,      store_one};
    }
};

}  // namespace

const VocabFunctions FL_VOCAB = {Row<float>::functions(), Row<BFloat16>::functions(), Row<Float16>::functions()};

}  // namespace cpu
}  // namespace fused_losses
