// The stages over V: a row's business (plain_row.cuh, terms_row.cuh) walked by an engine (two_sweeps.cuh, on_chip.cuh),
// one block per row, on chip one or two.
#pragma once

#include <type_traits>

#include "on_chip.cuh"
#include "plain_row.cuh"
#include "terms_row.cuh"
#include "token_ring.cuh"
#include "tokens.cuh"

namespace fused_losses {

// One pass: sweep, reduce, evaluate the objective, sweep again. The second sweep finds the row in L2 as long as the
// rows in flight fit there; launch.cu sees to that.
template <class T, class Row>
__global__ void __launch_bounds__(Row::kGradThreads, 1)
    loss_and_grad_kernel(const __grid_constant__ LossAndGradParams p) {
    typename Row::Shared& shared = shared_memory<typename Row::Shared>();
    int turn = 0;
    const Problem& problem = p.problem;
    const int vocab = static_cast<int>(p.logits.vocab);
    for (int64_t i = blockIdx.x; i < p.logits.n; i += gridDim.x) {
        Row row(problem.targets, problem.transform, i, i, i, vocab, p.logprobs.data, p.logprobs.n);
        const T* logits = row_pointer<T>(p.logits, i);
        const bool reads = problem.reads(i);
        if (reads) {
            row.read_targets(logits, p.logprobs.data);
            row.see(row.gather(sum_row<typename Row::Sums>(logits, vocab, row.left_out, row.z), shared, turn));
            row.evaluate(problem, problem.denominator.at(0), shared, turn);
        }
        if (threadIdx.x == 0) row.store(p.logprobs, p.row_losses, problem.terms.entropy, reads);
        T* grad = row_pointer<T>(p.grad, i);
        if (row.idle())  // as where the row was not read
            zero_row(grad, vocab);
        else
            row.write_targets(grad, map_row(logits, grad, vocab, row.template dense<Distance>()), row.left_out);
        row.finish(p.logprobs, threadIdx.x, blockDim.x, reads);
    }
}

struct OnChipParams {
    LossAndGradParams asked;
    int log_step;     // of the vectors in a chunk
    int chunks;       // in shared memory
    int announced;    // vectors of the next row that are brought to L2 ahead of their copies
    int team;         // blocks of a row
    bool normalises;  // whether each block forms the mean's normaliser for itself
};

// What all threads need of a row, which one warp has found out before the row before it was summed. In every thread it
// was a fifth of what a row costs beside its elements.
template <class T, class Row>
struct alignas(16) Prepared {
    const T* logits = nullptr;  // null where they are not read
    T* grad = nullptr;
    int row;
    std::remove_const_t<decltype(Row::z)> z;
    int left_out;         // of the whole row
    Place left_out_here;  // in this block's part
    Span<T> span;         // of logits
};

// The thread that has the one element it is asked for.
struct Owner {
    int thread;
    __device__ __forceinline__ int owner(int) const { return thread; }
};

template <class T, class Row>
struct alignas(128) OnChipShared {
    union {
        Partials<double, 1> weights;  // before the first row
        typename Row::Shared row;
    };
    float target[2];  // the target's logit, of reductions in turn
    TokenRing<Row::kSingle> ring;
    Prepared<T, Row> prepared[kRingTokens];  // of the ring's tokens
};

// The rows of a team, one in each turn of all teams. Teams change places from turn to turn: else a mask whose period
// meets their number would give the same few of them all rows that are read.
class Turns {
  public:
    __device__ __forceinline__ Turns(int number, int teams) : teams_(teams), place_(number) {}
    __device__ __forceinline__ int row() const { return first_ + place_; }
    __device__ __forceinline__ void advance() {
        first_ += teams_;
        place_ += static_cast<unsigned>(teams_) * 3 / 8;  // formed here: no register has it over a row
        if (place_ >= teams_) place_ -= teams_;
    }

  private:
    const int teams_;
    int place_, first_ = 0;
};

// The same, while the row is on chip. A row that the engine can't map, as its gradient has another phase or its maximum
// is too far for a fold, is swept by the other engine: so that which kernel runs depends on no row and on no layout.
template <class T, class Kind>
__global__ void __launch_bounds__(Kind::kThreadsOnChip, 1) on_chip_kernel(const __grid_constant__ OnChipParams params) {
    using Row = typename Kind::OnChip;
    using Sums = typename Row::Sums;
    using Shared = OnChipShared<T, Row>;
    Shared& shared = shared_memory<Shared>();
    TokenRing<Row::kSingle>& ring = shared.ring;
    const OnChip<T> chip(reinterpret_cast<uint4*>(&shared + 1), params.chunks, params.log_step);
    const LossAndGradParams& p = params.asked;
    const auto& problem = ring.problem;
    const int n = static_cast<int>(p.logits.n);
    const int vocab = static_cast<int>(p.logits.vocab);
    const Team team(params.team);
    const Part part = team.part<T>(vocab);
    // The last warp, whose share of a row is the smallest, looks after the tokens.
    const bool last_warp = threadIdx.x >= blockDim.x - kWarp, first_lane = threadIdx.x % kWarp == 0;
    const auto row_of = [&](const Rows& rows, int64_t i) {
        // in most tensors without its divisions: a hundred instructions
        return static_cast<T*>(rows.data) + (i < rows.inner ? i * rows.inner_stride : rows.offset(i)) + part.first;
    };
    const auto aim = [&](int slot, int i) -> int64_t { return Row::kSingle || p.problem.targets.single() ? slot : i; };
    // By the last warp: of row i, if there is one.
    const auto fetch_token = [&](int slot, int i) {
        if (first_lane) shared.prepared[slot].row = i;
        if (i < n) ring.fetch(slot, i);
    };
    // By the last warp, which has waited for the numbers of that token; a barrier must follow.
    const auto prepare = [&](int slot) {
        __syncwarp();
        const int i = shared.prepared[slot].row;
        Prepared<T, Row> to;
        to.row = i;
        if (i < n) {
            const Row row(problem.targets, problem.transform, slot, aim(slot, i), i, vocab, p.logprobs.data,
                          p.logprobs.n);
            to.z = row.z;
            to.left_out = row.left_out;
            to.grad = row_of(p.grad, i);
            if (problem.reads(slot, aim(slot, i))) {
                to.logits = row_of(p.logits, i);
                to.span = Span<T>(to.logits, part.size);
            }
            to.left_out_here = chip.place_of(to.span, part.index_of(row.left_out), to.grad);
        }
        chip.announce(to.logits, to.span, params.announced);
        __syncwarp();  // all have read the row
        if (first_lane) shared.prepared[slot] = to;
    };

    Turns turns(team.number(), team.teams());  // of the last warp: the row whose token is fetched next
    ring.start(p.problem);
    team.barrier();  // of a pair: both have begun
    if (last_warp) {
        for (int slot = 0; slot < kRingTokens - 1; ++slot, turns.advance()) fetch_token(slot, turns.row());
        commit_copies();
        wait_copies<0>();
        prepare(0);
    }
    __syncthreads();
    chip.fetch(in_global(shared.prepared[0].logits), shared.prepared[0].span);
    if (params.normalises) {  // while the first row is on its way
        const float normaliser = normaliser_of(shared.weights, n, p.problem.targets, p.problem.weights);
        if (threadIdx.x == 0) ring.set_denominator(normaliser);
        if (threadIdx.x == 0 && blockIdx.x == 0) *p.loss = normaliser;
        team.barrier();  // its partials lie where those of rows will, told by either block
    }
    const bool mass_only = !p.problem.terms.entropy && p.problem.terms.label_smoothing == 0.f;  // what else needs more
    int turn = 0, slot = 0;
    for (;;) {
        const Prepared<T, Row>& now = shared.prepared[slot];
        const int i = now.row;
        if (i >= n) break;
        const int next_slot = ring_slot(slot, 1);
        if (last_warp) prepare(next_slot);  // while copies of this row are on their way
        const T* const logits = in_global(now.logits);
        Row row(now.z, now.left_out, problem.targets, slot, aim(slot, i), i, vocab, p.logprobs.data, p.logprobs.n);
        bool near = true;
        uint32_t costly = 0;
        if (logits) {
            float& target = shared.target[turn];
            const auto found = [&](float logit) { team.tell(target, logit); };
            row.read_several_targets(logits, p.logprobs.data);
            const Online<Sums> mine =
                chip.template sum<Sums>(logits, now.span, now.left_out_here, row.z, found, mass_only, costly);
            const Online<Sums> all = row.gather(mine, shared.row, turn, team);
            row.take_target(target);
            row.see(all);
            near = row.near();
            if (!near)
                row.see(row.gather(sum_row<Sums>(logits, part.size, now.left_out_here.element, row.z), shared.row, turn,
                                   team));
            row.evaluate(problem, problem.denominator.at(0), shared.row, turn);
        } else {  // memory has its zeros to write while the block meets
            chip.wait_first();
            zero_row(in_global(now.grad), part.size);
            __syncthreads();
        }
        // One barrier ago, at least: all threads see what is prepared, and none needs the last token's numbers.
        if (last_warp) {
            fetch_token(ring_slot(slot, 3), turns.row());
            turns.advance();
            if (first_lane && team.rank() == 0) row.store(p.logprobs, p.row_losses, p.problem.terms.entropy, logits);
        }
        const Prepared<T, Row>& coming = shared.prepared[next_slot];
        const T* const next = in_global(coming.logits);
        T* const grad = in_global(now.grad);
        const bool idle = row.idle(), from_slots = !idle && near && skew_of<T>(logits, grad) == 0;
        if (!from_slots) chip.fetch(next, coming.span);
        if (idle) {
            if (logits) zero_row(grad, part.size);
        } else if (from_slots) {
            chip.template map<decltype(row.z)>(logits, grad, now.span, next, coming.span, row.template dense<Folded>(),
                                               row.template dense<Folded, Seen::cheap_logit>(),
                                               row.template dense<Folded, Seen::cheap_level>(), costly);
            row.write_targets(grad, Owner{now.left_out_here.writer}, now.left_out_here.element);
        } else {
            row.write_targets(grad, map_row(logits, grad, part.size, row.template dense<FoldedIfNear>()),
                              now.left_out_here.element);
        }
        row.finish(p.logprobs, threadIdx.x, blockDim.x, logits);
        slot = of_unknown_origin(next_slot);
    }
}

template <class T, class Row>
__global__ void __launch_bounds__(Row::kThreads, 1) stats_kernel(const __grid_constant__ StatsParams p) {
    typename Row::Shared& shared = shared_memory<typename Row::Shared>();
    int turn = 0;
    const Problem& problem = p.problem;
    const int vocab = static_cast<int>(p.logits.vocab);
    float* const target_logits = &p.stats.target(0);
    for (int64_t i = blockIdx.x; i < p.logits.n; i += gridDim.x) {
        Row row(problem.targets, problem.transform, i, i, i, vocab, target_logits, p.stats.n);
        const bool reads = problem.reads(i);
        if (reads) {
            const T* logits = row_pointer<T>(p.logits, i);
            row.read_targets(logits, target_logits);
            using Sums = typename Row::Sums;
            bool seen = false;
            if constexpr (Sums::kMassOnly) {
                row.see(row.gather(sum_row<Sums, FoldedOnline>(logits, vocab, row.left_out, row.z), shared, turn));
                seen = row.near();
            }
            if (!seen) row.see(row.gather(sum_row<Sums>(logits, vocab, row.left_out, row.z), shared, turn));
        }
        row.keep(p.stats, problem.terms, reads);
    }
}

// The same with statistics, of one target.
template <class T, class Row>
__global__ void __launch_bounds__(Row::kThreads, 1) statistics_kernel(const __grid_constant__ StatsParams p) {
    typename Row::Shared& shared = shared_memory<typename Row::Shared>();
    int turn = 0;
    const Problem& problem = p.problem;
    const int vocab = static_cast<int>(p.logits.vocab);
    for (int64_t i = blockIdx.x; i < p.logits.n; i += gridDim.x) {
        Row row(problem.targets, problem.transform, i, i, i, vocab, &p.stats.target(0), p.stats.n);
        const bool reads = problem.reads(i);
        if (reads) {
            const T* logits = row_pointer<T>(p.logits, i);
            row.read_targets(logits, nullptr);
            const Online<typename Row::Sums> all =
                row.gather(sum_row<typename Row::Sums>(logits, vocab, row.left_out, row.z), shared, turn);
            row.see(all);
            row.rank(logits, all.max);
        }
        row.keep(p.stats, problem.terms, reads);
    }
}

template <class T, class Row>
__global__ void __launch_bounds__(Row::kGradThreads, 1) grad_kernel(const __grid_constant__ GradParams p) {
    typename Row::Shared& shared = shared_memory<typename Row::Shared>();
    int turn = 0;
    const int vocab = static_cast<int>(p.logits.vocab);
    for (int64_t i = blockIdx.x; i < p.logits.n; i += gridDim.x) {
        Row row(p.targets, p.transform, i, i, i, vocab, &p.stats.target(0), p.stats.n);
        row.recall(p.stats);
        row.send(p.coefficients, p.upstream.at(i), shared, turn);
        T* grad = row_pointer<T>(p.grad, i);
        if (row.idle())
            zero_row(grad, vocab);
        else
            row.write_targets(grad, map_row(row_pointer<T>(p.logits, i), grad, vocab, row.template dense<Distance>()),
                              row.left_out);
    }
}

}  // namespace fused_losses
