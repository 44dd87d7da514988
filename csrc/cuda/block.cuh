// Reductions over a block, or a team of them. Every thread gets the same bits: a butterfly adds the same pairs in every
// lane, and addition commutes. The order is fixed, so results repeat bitwise.
#pragma once

#include "sums.cuh"
#include "team.cuh"

namespace fused_losses {

constexpr int kWarp = 32;  // as many lanes as a team has warps at most, so that one warp can reduce the partials
constexpr unsigned kFullMask = 0xffffffffu;

constexpr int kFew = 8;  // partials that every eight lanes have for themselves: the same sum in fewer steps

template <class T>
__device__ __forceinline__ T warp_sum(T x, bool few = false) {
    if (!few) {
#pragma unroll
        for (int lane = kWarp / 2; lane >= kFew; lane /= 2) x += __shfl_xor_sync(kFullMask, x, lane);
    }
#pragma unroll
    for (int lane = kFew / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullMask, x, lane);
    return x;
}

__device__ __forceinline__ Sum warp_sum(const Sum& x, bool few) { return {warp_sum(x.sum, few)}; }
__device__ __forceinline__ Moments warp_sum(const Moments& x, bool few) {
    return {warp_sum(x.sum, few), warp_sum(x.moment, few), warp_sum(x.drift, few), warp_sum(x.count, few)};
}

// Of numbers: integers of the same order, as the machine finds the largest of a warp's at once.
__device__ __forceinline__ float warp_max(float x) {
    const auto turned = [](int bits) { return bits ^ (bits >> 31 & 0x7fffffff); };
    return __int_as_float(turned(__reduce_max_sync(kFullMask, turned(__float_as_int(x)))));
}
__device__ __forceinline__ MomentsAndSquares warp_sum(const MomentsAndSquares& x, bool few) {
    return {warp_sum(static_cast<const Moments&>(x), few), warp_sum(x.squares, few)};
}

// All sums end up relative to the one maximum, then they are added.
template <class Sums, class Z>
__device__ __forceinline__ Online<Sums> warp_sum(Online<Sums> x, const Z& z, bool few) {
    x.rescale(warp_max(x.max), z);
    x.sums = warp_sum(x.sums, few);
    return x;
}

// kSets: 1 where there is one reduction in all.
template <class T, int kSets = 2>
struct Partials {
    T of_warps[kSets][kWarp];
};

// reduce: over a warp, or over each kFew lanes of one, (T, few) -> T. identity: of lanes that have no warp's partial to
// contribute.
//
// One barrier, of the team. Two sets of partials take turns: a warp that is already in the next reduction must not
// overwrite what a slower one still reads, and nobody is two ahead, because of the barrier in between. turn: 0 at
// first, the same for all reductions of a kernel, as one of another kind is such a barrier, too.
template <class T, int kSets, class Reduce>
__device__ __forceinline__ T team_reduce(const Team& team, Partials<T, kSets>& shared, int& turn, T x, T identity,
                                         Reduce reduce) {
    T* partials = shared.of_warps[turn];
    turn ^= 1;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    x = reduce(x, false);
    if (lane == 0) {
        if (team.size() == 1)
            partials[warp] = x;
        else
            team.tell(partials[team.rank() * warps + warp], x);
    }
    team.barrier();
    const int count = team.size() * warps;
    const bool few = count <= kFew;
    const int mine = few ? lane % kFew : lane;
    if (mine < count) identity = partials[mine];
    return reduce(identity, few);
}
template <class T, int kSets, class Reduce>
__device__ __forceinline__ T block_reduce(Partials<T, kSets>& shared, int& turn, T x, T identity, Reduce reduce) {
    return team_reduce(Team(), shared, turn, x, identity, reduce);
}

}  // namespace fused_losses
