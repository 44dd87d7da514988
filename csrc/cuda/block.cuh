// Reductions over a block, or a team of them. Every thread gets the same bits: a butterfly adds the same pairs in every
// lane, and addition commutes. The order is fixed, so results repeat bitwise.
#pragma once

#include "sums.cuh"
#include "team.cuh"

namespace fused_losses {

constexpr int kWarp = 32;  // as many lanes as a team has warps at most, so that one warp can reduce the partials
constexpr unsigned kFullMask = 0xffffffffu;

template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(kFullMask, x, lane);
    return x;
}

__device__ __forceinline__ Sum warp_sum(const Sum& x) { return {warp_sum(x.sum)}; }
__device__ __forceinline__ Moments warp_sum(const Moments& x) {
    return {warp_sum(x.sum), warp_sum(x.moment), warp_sum(x.drift), warp_sum(x.count)};
}
__device__ __forceinline__ MomentsAndSquares warp_sum(const MomentsAndSquares& x) {
    return {warp_sum(static_cast<const Moments&>(x)), warp_sum(x.squares)};
}

// All sums end up relative to the one maximum, then they are added.
template <class Sums, class Z>
__device__ __forceinline__ Online<Sums> warp_sum(Online<Sums> x, const Z& z) {
    float max = x.max;
#pragma unroll
    for (int lane = kWarp / 2; lane > 0; lane /= 2) max = fmaxf(max, __shfl_xor_sync(kFullMask, max, lane));
    x.rescale(max, z);
    x.sums = warp_sum(x.sums);
    return x;
}

template <class T>
struct Partials {
    T of_warps[2][kWarp];
};

// reduce: over a warp, T -> T. identity: of lanes that have no warp's partial to contribute.
//
// One barrier, of the team. Two sets of partials take turns: a warp that is already in the next reduction must not
// overwrite what a slower one still reads, and nobody is two ahead, because of the barrier in between. turn: 0 at
// first, the same for all reductions of a kernel, as one of another kind is such a barrier, too.
template <class T, class Reduce>
__device__ __forceinline__ T team_reduce(const Team& team, Partials<T>& shared, int& turn, T x, T identity,
                                         Reduce reduce) {
    T* partials = shared.of_warps[turn];
    turn ^= 1;
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp, warps = blockDim.x / kWarp;
    x = reduce(x);
    if (lane == 0) team.tell(partials[team.rank() * warps + warp], x);
    team.barrier();
    if (lane < team.size() * warps) identity = partials[lane];
    return reduce(identity);
}
template <class T, class Reduce>
__device__ __forceinline__ T block_reduce(Partials<T>& shared, int& turn, T x, T identity, Reduce reduce) {
    return team_reduce(Team(), shared, turn, x, identity, reduce);
}

}  // namespace fused_losses
