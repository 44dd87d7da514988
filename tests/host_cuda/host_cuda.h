// CUDA's execution model for g++: the files of csrc/cuda compile unchanged and run on the CPU, one fiber per thread.
//
// Blocks run one after another. Within a block, one warp runs until all its lanes wait, then the next: ascending or
// descending, so that what a missing barrier leaves to chance goes both ways. Shared memory starts as NaN bytes. A
// block whose threads wait for each other forever is an error. Not modelled: memory ordering, caches, launch limits,
// speed.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#include <memory>
#include <stdexcept>
#include <string>
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
    enum State { ready, shuffling, at_barrier, done };

    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    State state = done;
    void* fake_stack = nullptr;
};

struct Warp {
    int arrived = 0;
    int turn = 0;
    int operand = 0;             // of the shuffle in progress: must agree, or the lanes are not in the same one
    uint64_t slots[2][kWarp]{};  // two, as a lane may be in the next shuffle before another has read
};

class Block {
  public:
    Dim index{}, blocks{}, threads{}, thread{};
    std::vector<uint64_t> shared;
    size_t shared_bytes = 0;
    void (*ended)() = nullptr;  // called when all threads of a block have returned

    template <class Params>
    void run(void (*kernel)(Params), const Params& params) {
        const int count = static_cast<int>(threads.x);
        warps_.assign(count / kWarp, Warp{});
        shared.assign(shared.size(), ~uint64_t{0});
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
        Fiber& self = *fibers_[thread.x];
        self.state = state;
        to_scheduler(self, false);
    }

    Warp& warp() { return warps_[thread.x / kWarp]; }

    void release(Fiber::State state, int first, int count) {
        for (int i = first; i < first + count; ++i)
            if (fibers_[i]->state == state) fibers_[i]->state = Fiber::ready;
    }

  private:
    // Runs every warp until all its lanes wait; then opens the barrier. False when all threads have returned.
    bool advance(int count) {
        const int warps = count / kWarp;
        for (int w = 0; w < warps; ++w) {
            const int first = (descending ? warps - 1 - w : w) * kWarp;
            for (bool ran = true; ran;) {
                ran = false;
                for (int lane = 0; lane < kWarp; ++lane) {
                    const int i = first + (descending ? kWarp - 1 - lane : lane);
                    if (fibers_[i]->state != Fiber::ready) continue;
                    thread.x = static_cast<unsigned>(i);
                    to_fiber(*fibers_[i]);
                    ran = true;
                }
            }
        }
        int waiting = 0, returned = 0;
        for (int i = 0; i < count; ++i) {
            waiting += fibers_[i]->state == Fiber::at_barrier;
            returned += fibers_[i]->state == Fiber::done;
        }
        if (returned == count) return false;
        if (waiting != count)
            fail("deadlock in block " + std::to_string(index.x) + ": of " + std::to_string(count) + " threads " +
                 std::to_string(returned) + " have returned and " + std::to_string(waiting) + " are at a barrier");
        release(Fiber::at_barrier, 0, count);
        return true;
    }

    void prepare(Fiber& fiber) {
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = fiber.stack.get();
        fiber.context.uc_stack.ss_size = kStack;
        fiber.context.uc_link = nullptr;
        fiber.fake_stack = nullptr;
        const uintptr_t self = reinterpret_cast<uintptr_t>(this);
        makecontext(&fiber.context, reinterpret_cast<void (*)()>(&Block::enter), 2, static_cast<unsigned>(self),
                    static_cast<unsigned>(self >> 32));
        fiber.state = Fiber::ready;
    }

    static void enter(unsigned low, unsigned high) {
        Block& block = *reinterpret_cast<Block*>(static_cast<uintptr_t>(high) << 32 | low);
        block.arrived_in_fiber(nullptr);
        block.body_(block.kernel_, block.params_);
        Fiber& self = *block.fibers_[block.thread.x];
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
    void (*body_)(const void*, const void*) = nullptr;
    const void* kernel_ = nullptr;
    const void* params_ = nullptr;
};

inline Block block;

inline void check_aligned(const uint4* p) {
    if (reinterpret_cast<uintptr_t>(p) % 16) fail("misaligned vector access");
}

}  // namespace host_cuda

#define threadIdx (host_cuda::block.thread)
#define blockIdx (host_cuda::block.index)
#define blockDim (host_cuda::block.threads)
#define gridDim (host_cuda::block.blocks)

inline void __syncthreads() { host_cuda::block.wait(host_cuda::Fiber::at_barrier); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int operand) {
    static_assert(sizeof(T) <= sizeof(uint64_t), "");
    using namespace host_cuda;
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
        block.release(Fiber::shuffling, static_cast<int>(block.thread.x) - lane, kWarp);
    } else {
        block.wait(Fiber::shuffling);
    }
    memcpy(&value, &slots[lane ^ operand], sizeof(T));
    return value;
}

inline int __any_sync(unsigned mask, int predicate) {
    for (int lane = host_cuda::kWarp / 2; lane > 0; lane /= 2) predicate |= __shfl_xor_sync(mask, predicate, lane);
    return predicate;
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

inline float multiply(float a, float b) { return a * b; }

inline uint4 load(const uint4* p) {
    host_cuda::check_aligned(p);
    return *p;
}
inline uint4 load_last(const uint4* p) { return load(p); }
inline void store_streaming(uint4* p, uint4 v) {
    host_cuda::check_aligned(p);
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

template <class S>
S& shared_memory() {
    if (sizeof(S) > host_cuda::block.shared_bytes) host_cuda::fail("the launch asked for too little shared memory");
    return *reinterpret_cast<S*>(host_cuda::block.shared.data());
}

}  // namespace fused_losses
