// What the two kinds of rows have in common. A row says what is summed of its elements and what is sent back to them;
// no loop over elements is here, and no loss: an engine (two_sweeps.cuh, on_chip.cuh) walks, and loss.h has the maths
// of a token.
//
// A kind of row offers, to kernels.cuh and tokens.cuh:
//
//     Sums, Shared, kThreads              what is summed, and where a block does it
//     kStatistics                         whether these are asked for
//     z, left_out                         for the sweep: from a logit to z, and the element that is no part of the sums
//     read_targets, gather, see, keep     stage 1: from the row to its stats
//     read_several_targets, take_target   the former, for an engine that has met the single target on its way
//     rank                                with statistics, stage 1 once more: whether the target is the first of the
//                                         largest
//     near                                whether Folded does for what was seen
//     recall                              stages 2 and 3: the stats that stage 1 kept
//     evaluate, store, finish, keep       stage 2: the loss, its outputs and its coefficients
//     send, idle, dense, write_targets    stage 3: the gradient
#pragma once

#include "../loss.h"
#include "block.cuh"
#include "two_sweeps.cuh"

namespace fused_losses {

template <class T>
__device__ __forceinline__ T* row_pointer(const Rows& rows, int64_t row) {
    return static_cast<T*>(rows.data) + rows.offset(row);
}

// Target i = row * K + k, or -1 if it is outside [0, V).
template <class Aims>
__device__ __forceinline__ int target_index(const Aims& targets, int64_t i, int vocab) {
    const int64_t target = targets.at(i);
    return 0 <= target && target < vocab ? static_cast<int>(target) : -1;
}

// NaN for a target outside [0, V). In place it must be read before a sweep overwrites it.
template <class T>
__device__ __forceinline__ float target_logit(const T* logits, int target) {
    return target >= 0 ? to_float(logits[target]) : NAN;
}

// z_logit - z_maximum
template <class Z>
__device__ __forceinline__ float distance_from(float maximum, float logit, const Z& z) {
    return target_distance(z.level(logit), z.level(maximum), z.scale);
}

// A row without mass, one that holds a NaN, and one whose maximum is a mask, are not.
template <class Z>
__device__ __forceinline__ bool all_near(const Z& z, float sum, float maximum, float top) {
    return (sum > 0.f) & Folded<Z>(z, maximum).near() & Folded<Z>(z, top).near();
}

}  // namespace fused_losses
