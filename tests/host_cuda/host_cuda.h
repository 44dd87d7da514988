// CUDA's execution model for g++: the files of csrc/cuda compile unchanged and run on the CPU, one fiber per thread.
//
// Blocks run one after another; of a cluster one runs until it waits for the others, and then the next. Within a block,
// one warp runs until all its lanes wait, then the next: ascending or descending, so that what a missing barrier leaves
// to chance goes both ways. Shared memory starts as NaN bytes. A block whose threads wait for each other forever is an
// error, and so is another block's shared memory before that has begun or after it has ended. What orders memory, and
// what does not, is for races.cpp. Not modelled: caches, speed.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <map>
#include <memory>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};

namespace host_cuda {

struct Dim {
    unsigned x;
};

extern bool descending;  // the order of blocks, warps and lanes

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;  // of a fiber; pages come on demand

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("host_cuda: " + what); }

// Fibers switch to and from the scheduler only. AddressSanitizer must be told where the new stack is.
struct Fiber {
    enum State { ready, shuffling, at_barrier, at_cluster_barrier, done };

    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = done;
    void* fake_stack = nullptr;
    int warp_barriers = 0;  // behind it
};

// When a thread does something: what races.cpp orders it by. barriers: that it has behind it.
struct Moment {
    int cluster = -1, thread = 0, barriers = 0, pair_barriers = 0, warp_barriers = 0;
};

struct Warp {
    int arrived = 0;
    int turn = 0;
    int operand = 0;             // of the shuffle in progress: must agree, or the lanes are not in the same one
    uint64_t slots[2][kWarp]{};  // two, as a lane may be in the next shuffle before another has read
};

class Block {
  public:
    Dim index{}, blocks{}, threads{}, thread{};  // index, thread: of the fiber that runs
    size_t shared_bytes = 0;
    void (*ended)() = nullptr;  // called when all threads of a block have returned
    int64_t launch = 0, run_number = 0;
    bool watched = false;  // whether it is device code that runs, and none of what stands in for something

    int rank() const { return static_cast<int>(index.x) - first_; }
    int together() const { return together_; }
    // The shared memory of a block of the cluster.
    char* shared(int rank) { return reinterpret_cast<char*>(shared_[rank].data()); }
    // Whether that is to be had: the block has begun, and not all of its threads have returned.
    bool lives(int rank) const {
        const int own = static_cast<int>(threads.x);
        return begun_[rank] && in(Fiber::done, rank * own, own) < own;
    }

    // Blocks first to first + together - 1, which are a cluster.
    template <class Params>
    void run(void (*kernel)(Params), const Params& params, int first, int together) {
        const int count = static_cast<int>(threads.x) * together;
        ++run_number;
        first_ = first;
        together_ = together;
        pair_barriers_ = 0;
        warps_.assign(count / kWarp, Warp{});
        begun_.assign(together, false);
        barriers_.assign(together, 0);
        shared_.resize(together);
        for (auto& memory : shared_)
            std::vector<uint64_t>((shared_bytes + 15) / 16 * 2 + 16, ~uint64_t{0}).swap(memory);  // ends are found
        while (static_cast<int>(fibers_.size()) < count) fibers_.emplace_back(new Fiber);
        body_ = [](const void* k, const void* p) {
            reinterpret_cast<void (*)(Params)>(const_cast<void*>(k))(*static_cast<const Params*>(p));
        };
        kernel_ = reinterpret_cast<const void*>(kernel);
        params_ = &params;
        for (int i = 0; i < count; ++i) prepare(*fibers_[i]);
        while (advance(count)) {
        }
        if (ended) ended();
    }

    void wait(Fiber::State state) {
        const bool was = std::exchange(watched, false);
        Fiber& self = *fibers_[running()];
        self.state = state;
        to_scheduler(self, false);
        watched = was;
    }

    // How many barriers of all its threads the block has behind it.
    int barriers() const { return barriers_[rank()]; }

    Moment now() const {
        const int thread = running();
        return {first_, thread, barriers(), pair_barriers_, fibers_[thread]->warp_barriers};
    }
    void passed_warp_barrier() { ++fibers_[running()]->warp_barriers; }
    bool is_shared(const void* p) const {
        for (const auto& memory : shared_)
            if (memory.data() <= p && p < memory.data() + memory.size()) return true;
        return false;
    }
    // Whether nobody else can see it: the stack of the fiber that runs, or the model itself.
    bool is_private(const void* p) const {
        const char* const stack = fibers_[running()]->stack.get();
        return (stack <= p && p < stack + kStack) || (this <= p && p < this + 1);
    }

    // Of the fiber that runs: its number in the cluster.
    int running() const { return rank() * static_cast<int>(threads.x) + static_cast<int>(thread.x); }
    Warp& warp() { return warps_[running() / kWarp]; }

    void release(Fiber::State state, int first, int count) {
        for (int i = first; i < first + count; ++i)
            if (fibers_[i]->state == state) fibers_[i]->state = Fiber::ready;
    }

  private:
    int in(Fiber::State state, int first, int count) const {
        int found = 0;
        for (int i = first; i < first + count; ++i) found += fibers_[i]->state == state;
        return found;
    }

    // Runs every block until all its threads have returned or wait for the others; then opens the barrier of all. False
    // when all threads have returned.
    bool advance(int count) {
        for (int b = 0; b < together_; ++b) {
            const int rank = descending ? together_ - 1 - b : b, own = static_cast<int>(threads.x);
            begun_[rank] = true;
            for (run_warps(rank * own, own); in(Fiber::at_barrier, rank * own, own) == own;
                 run_warps(rank * own, own)) {
                ++barriers_[rank];
                release(Fiber::at_barrier, rank * own, own);
            }
        }
        if (in(Fiber::done, 0, count) == count) return false;
        if (in(Fiber::at_cluster_barrier, 0, count) < count)
            fail("deadlock in block " + std::to_string(first_) + ": of " + std::to_string(count) + " threads " +
                 std::to_string(in(Fiber::done, 0, count)) + " have returned, " +
                 std::to_string(in(Fiber::at_barrier, 0, count)) + " are at a barrier and " +
                 std::to_string(in(Fiber::at_cluster_barrier, 0, count)) + " at one of the cluster");
        for (int& barriers : barriers_) ++barriers;
        ++pair_barriers_;
        release(Fiber::at_cluster_barrier, 0, count);
        return true;
    }
    // Of the threads from first on, each warp until all its lanes wait.
    void run_warps(int first, int count) {
        const int warps = count / kWarp;
        for (int w = 0; w < warps; ++w) {
            const int of_warp = first + (descending ? warps - 1 - w : w) * kWarp;
            for (bool ran = true; ran;) {
                ran = false;
                for (int lane = 0; lane < kWarp; ++lane) {
                    const int i = of_warp + (descending ? kWarp - 1 - lane : lane);
                    if (fibers_[i]->state != Fiber::ready) continue;
                    thread.x = i % threads.x;
                    index.x = first_ + i / threads.x;
                    to_fiber(*fibers_[i]);
                    ran = true;
                }
            }
        }
    }

    void prepare(Fiber& fiber) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        fiber.fake_stack = nullptr;
        fiber.warp_barriers = 0;
        const uintptr_t self = reinterpret_cast<uintptr_t>(this);
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 2, static_cast<unsigned>(self),
                    static_cast<unsigned>(self >> 32));
        fiber.state = Fiber::ready;
    }

    static void enter(unsigned low, unsigned high) {
        Block& block = *reinterpret_cast<Block*>(static_cast<uintptr_t>(high) << 32 | low);
        block.arrived_in_fiber(nullptr);
        block.watched = true;
        block.body_(block.kernel_, block.params_);
        Fiber& self = *block.fibers_[block.running()];
        block.watched = false;
        self.state = Fiber::done;
        block.to_scheduler(self, true);
    }

#if defined(__SANITIZE_ADDRESS__)
    void to_fiber(Fiber& fiber) {
        void* fake_stack;
        __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStack);
        swapcontext(&scheduler_, &fiber.context);
        __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
    }
    void to_scheduler(Fiber& fiber, bool last) {
        __sanitizer_start_switch_fiber(last ? nullptr : &fiber.fake_stack, scheduler_stack_, scheduler_size_);
        swapcontext(&fiber.context, &scheduler_);
        arrived_in_fiber(fiber.fake_stack);
    }
    void arrived_in_fiber(void* fake_stack) {
        __sanitizer_finish_switch_fiber(fake_stack, &scheduler_stack_, &scheduler_size_);
    }
    const void* scheduler_stack_ = nullptr;
    size_t scheduler_size_ = 0;
#else
    void to_fiber(Fiber& fiber) { swapcontext(&scheduler_, &fiber.context); }
    void to_scheduler(Fiber& fiber, bool) { swapcontext(&fiber.context, &scheduler_); }
    void arrived_in_fiber(void*) {}
#endif

    ucontext_t scheduler_;
    std::vector<std::unique_ptr<Fiber>> fibers_;
    std::vector<Warp> warps_;
    std::vector<std::vector<uint64_t>> shared_;
    std::vector<bool> begun_;
    std::vector<int> barriers_;
    int first_ = 0, together_ = 1, pair_barriers_ = 0;
    void (*body_)(const void*, const void*) = nullptr;
    const void* kernel_ = nullptr;
    const void* params_ = nullptr;
};

inline Block block;

// As long as it lives, nothing is watched.
class Aside {
  public:
    Aside() : was_(std::exchange(block.watched, false)) {}
    ~Aside() { block.watched = was_; }

  private:
    const bool was_;
};

// The thread that runs accesses these bytes, for something that stands in for it.
#if defined(FL_RACES)
void see(const void* p, size_t bytes, bool writes, const void* from);
#else
inline void see(const void*, size_t, bool, const void*) {}
#endif

inline void check_aligned(const uint4* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16) fail("misaligned vector access");
}

// How many lines of 128 bytes the stores of vectors go to, each warp's one after another: a line that two of them share
// counts twice. Those that the lanes of a warp come to as their n-th are taken for one store.
class Stores {
  public:
    void count(bool on) {
        counts_ = on;
        seen_.clear();
        nth_.clear();
        lines_ = 0;
    }
    int64_t lines() const { return lines_; }

    void store(const void* to) {
        if (!counts_) return;
        const Aside aside;
        const unsigned lane = block.thread.x, of_block = block.index.x;
        const unsigned nth = nth_[{of_block, lane}]++;
        lines_ += seen_.insert({of_block, lane / kWarp, nth, reinterpret_cast<uintptr_t>(to) / 128}).second;
    }

  private:
    bool counts_ = false;
    int64_t lines_ = 0;
    std::map<std::pair<unsigned, unsigned>, unsigned> nth_;
    std::set<std::tuple<unsigned, unsigned, unsigned, uintptr_t>> seen_;
};

inline Stores stores;

}  // namespace host_cuda

inline host_cuda::Dim& threadIdx = host_cuda::block.thread;
inline host_cuda::Dim& blockIdx = host_cuda::block.index;
inline host_cuda::Dim& blockDim = host_cuda::block.threads;
inline host_cuda::Dim& gridDim = host_cuda::block.blocks;

inline void __syncthreads() { host_cuda::block.wait(host_cuda::Fiber::at_barrier); }

inline int __syncthreads_or(int predicate) {
    const host_cuda::Aside aside;
    static int any = 0;  // of one block at a time, but for a team's, which do not come here
    any |= predicate != 0;
    __syncthreads();
    const int all = any;
    __syncthreads();
    any = 0;
    __syncthreads();
    return all;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int operand) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "");
    using namespace host_cuda;
    const Aside aside;
    Warp& warp = block.warp();
    const int lane = block.thread.x % kWarp;
    if (mask != 0xffffffffu) fail("only full masks are modelled");
    if (warp.arrived > 0 && warp.operand != operand) fail("lanes of a warp are in different shuffles");
    warp.operand = operand;
    uint64_t* slots = warp.slots[warp.turn];
    memcpy(&slots[lane], &value, sizeof(T));
    if (++warp.arrived == kWarp) {
        warp.arrived = 0;
        warp.turn ^= 1;
        block.release(Fiber::shuffling, block.running() - lane, kWarp);
    } else {
        block.wait(Fiber::shuffling);
    }
    memcpy(&value, &slots[lane ^ operand], sizeof(T));
    return value;
}

// Lanes run one after another: one is past this only when all have come to it.
inline void __syncwarp() {
    const host_cuda::Aside aside;
    __shfl_xor_sync(0xffffffffu, 0, 1);
    host_cuda::block.passed_warp_barrier();
}

inline int __any_sync(unsigned mask, int predicate) {
    for (int lane = host_cuda::kWarp / 2; lane > 0; lane /= 2) predicate |= __shfl_xor_sync(mask, predicate, lane);
    return predicate;
}

inline int __reduce_max_sync(unsigned mask, int value) {
    for (int lane = host_cuda::kWarp / 2; lane > 0; lane /= 2) {
        const int other = __shfl_xor_sync(mask, value, lane);
        value = other > value ? other : value;
    }
    return value;
}

inline float __int_as_float(int bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline int __float_as_int(float x) {
    int bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline float __uint_as_float(unsigned bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline unsigned __float_as_uint(float x) {
    unsigned bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}

// What follows stands in for csrc/cuda/intrinsics.cuh.
namespace fused_losses {

// As wrong as the instruction may be, 2^-22, this way or that; integers and infinity are exact, subnormals zero.
inline float exp2_approx(float x) {
    const float y = exp2f(x);
    if (fabsf(y) < 1.17549435e-38f) return 0.f;
    if (x == floorf(x) || isinf(y)) return y;
    return __float_as_uint(x) & 1 ? y + y * 0x1p-22f : y - y * 0x1p-22f;
}

inline float reciprocal_approx(float x) {
    const float y = 1.f / x;
    return __float_as_uint(x) & 1 ? nextafterf(y, INFINITY) : nextafterf(y, 0.f);
}

inline int of_unknown_origin(int x) { return x; }
inline float of_unknown_origin(float x) { return x; }
inline int zeros_below(uint32_t x) { return x == 0 ? 32 : __builtin_ctz(x); }

inline float multiply(float a, float b) { return a * b; }
inline float2 multiply(float2 a, float2 b) { return {a.x * b.x, a.y * b.y}; }
inline float2 multiply_add(float2 a, float2 b, float2 c) { return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)}; }
inline float2 plus(float2 a, float2 b) { return {a.x + b.x, a.y + b.y}; }

inline uint4 load(const uint4* p) {
    host_cuda::check_aligned(p);
    return *p;
}
inline uint4 load_kept(const uint4* p) { return load(p); }
inline uint4 load_last(const uint4* p) { return load(p); }
inline void store_streaming(uint4* p, uint4 v) {
    host_cuda::check_aligned(p);
    host_cuda::stores.store(p);
    *p = v;
}

inline uint32_t round_bfloat16(float x) {
    if (x != x) return 0x7fff;
    const uint32_t bits = __float_as_uint(x);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline float2 from_bfloat16x2(uint32_t pair) {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}
inline uint32_t to_bfloat16x2(float low, float high) { return round_bfloat16(high) << 16 | round_bfloat16(low); }

inline float2 from_float16x2(uint32_t pair) {
    _Float16 halves[2];
    memcpy(halves, &pair, sizeof pair);
    return {static_cast<float>(halves[0]), static_cast<float>(halves[1])};
}
inline uint32_t to_float16x2(float low, float high) {
    const _Float16 halves[2] = {static_cast<_Float16>(low), static_cast<_Float16>(high)};
    uint32_t pair;
    memcpy(&pair, halves, sizeof pair);
    return pair;
}

inline uint32_t max_bfloat16x2(uint32_t a, uint32_t b) {
    const float2 x = from_bfloat16x2(a), y = from_bfloat16x2(b);
    return to_bfloat16x2(fmaxf(x.x, y.x), fmaxf(x.y, y.y));
}
inline uint32_t max_float16x2(uint32_t a, uint32_t b) {
    const float2 x = from_float16x2(a), y = from_float16x2(b);
    return to_float16x2(fmaxf(x.x, y.x), fmaxf(x.y, y.y));
}

inline uint32_t min_bfloat16x2(uint32_t a, uint32_t b) {
    const float2 x = from_bfloat16x2(a), y = from_bfloat16x2(b);
    return to_bfloat16x2(fminf(x.x, y.x), fminf(x.y, y.y));
}
inline uint32_t min_float16x2(uint32_t a, uint32_t b) {
    const float2 x = from_float16x2(a), y = from_float16x2(b);
    return to_float16x2(fminf(x.x, y.x), fminf(x.y, y.y));
}

template <class T>
T* in_global(T* p) {
    return p;
}

template <class S>
S& shared_memory() {
    const host_cuda::Aside aside;
    if (sizeof(S) > host_cuda::block.shared_bytes) host_cuda::fail("the launch asked for too little shared memory");
    return *reinterpret_cast<S*>(host_cuda::block.shared(host_cuda::block.rank()));
}

// What follows stands in for csrc/cuda/team.cuh.
inline void pair_barrier() {
    if (host_cuda::block.together() != 2) host_cuda::fail("a pair's barrier in a block of its own");
    host_cuda::block.wait(host_cuda::Fiber::at_cluster_barrier);
}
template <class T>
T* place_of(T* mine, unsigned rank) {
    using host_cuda::block;
    const host_cuda::Aside aside;
    const int64_t at = reinterpret_cast<char*>(mine) - block.shared(block.rank());
    if (at < 0 || at + sizeof(T) > block.shared_bytes) host_cuda::fail("no place of the block's shared memory");
    if (static_cast<int>(rank) >= block.together()) host_cuda::fail("a block outside the cluster");
    if (!block.lives(rank)) host_cuda::fail("a block that has not begun, or has ended");
    return reinterpret_cast<T*>(block.shared(rank) + at);
}

}  // namespace fused_losses
