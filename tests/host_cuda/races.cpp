// A race detector for the device code: what compute-sanitizer's racecheck would say of shared memory, and the same of
// global memory. device.cpp is compiled with -fsanitize=thread, so that every access calls a function, and linked with
// those below in the place of that sanitizer's: CUDA's order is known here, and is simpler than a mutex's.
//
// Of two accesses to a place by different threads, one of them a write, one must come before the other by
//
//     a barrier of the block, or of the pair where they are in two blocks of it, that lies between them, or
//     a __syncwarp between them, for lanes of one warp: other instructions of a warp order no memory
//
// and not by how the fibers happened to run. Blocks of one launch are never ordered, launches always are.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <unordered_map>

#include "host_cuda.h"

namespace host_cuda {
namespace {

constexpr int kGranule = 2;  // bytes: of the smallest element
constexpr int kOfLine = 8;   // granules that are looked up together

struct Access : Moment {
    const void* from = nullptr;  // the instruction; null: there was none

    bool before(const Access& now) const {
        const int of_block = static_cast<int>(block.threads.x);
        if (cluster != now.cluster) return false;
        if (thread == now.thread) return true;
        if (thread / of_block != now.thread / of_block) return pair_barriers < now.pair_barriers;
        if (barriers < now.barriers) return true;
        return thread / kWarp == now.thread / kWarp && warp_barriers < now.warp_barriers;
    }
};

struct Place {
    Access write;
    std::vector<Access> reads;  // since then, without those that come before another one of them
};

class Memory {
  public:
    void see(const void* p, size_t bytes, bool writes, const void* from) {
        if (of_launch_ != block.launch) global_.clear();
        if (of_run_ != block.run_number) shared_.clear();
        of_launch_ = block.launch;
        of_run_ = block.run_number;
        const uintptr_t first = reinterpret_cast<uintptr_t>(p) / kGranule;
        const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes - 1) / kGranule;
        const bool shared = block.is_shared(p);
        const Access now{block.now(), from};
        for (uintptr_t granule = first; granule <= last; ++granule) {
            Place& place = (shared ? shared_ : global_)[granule / kOfLine][granule % kOfLine];
            if (place.write.from && !place.write.before(now)) conflict(place.write, "wrote", now, writes, shared);
            if (writes) {
                for (const Access& read : place.reads)
                    if (!read.before(now)) conflict(read, "read", now, writes, shared);
                place.write = now;
                place.reads.clear();
            } else {
                add(place.reads, now);
            }
        }
    }

  private:
    static void add(std::vector<Access>& reads, const Access& now) {
        // Of those of one interval none is before another: the first and the last tell without a look at all.
        if (!reads.empty() && reads.back().thread == now.thread && reads.back().cluster == now.cluster)
            reads.pop_back();
        else if (!reads.empty() && reads.front().before(now))
            reads.erase(std::remove_if(reads.begin(), reads.end(), [&](const Access& r) { return r.before(now); }),
                        reads.end());
        reads.push_back(now);
    }
    [[noreturn]] static void conflict(const Access& then, const char* did, const Access& now, bool writes, bool shared) {
        fail("a race: " + text(now, writes ? "writes" : "reads", shared) + " what " + text(then, did, shared) +
             ", and nothing orders them");
    }
    static std::string text(const Access& access, const char* does, bool shared) {
        Dl_info library{};
        dladdr(access.from, &library);
        const auto offset = static_cast<const char*>(access.from) - static_cast<const char*>(library.dli_fbase);
        const int of_block = static_cast<int>(block.threads.x);
        return "thread " + std::to_string(access.thread % of_block) + " of block " +
               std::to_string(access.cluster + access.thread / of_block) + " at " + std::to_string(offset) + " " + does +
               (shared ? " in shared memory" : " in global memory");
    }

    std::unordered_map<uintptr_t, std::array<Place, kOfLine>> shared_, global_;
    int64_t of_launch_ = -1, of_run_ = -1;
};

Memory memory;

}  // namespace

void see(const void* p, size_t bytes, bool writes, const void* from) {
    if (!block.is_private(p)) memory.see(p, bytes, writes, from);
}
void see_if_watched(const void* p, size_t bytes, bool writes, const void* from) {
    if (!block.watched) return;
    const Aside aside;
    see(p, bytes, writes, from);
}

}  // namespace host_cuda

#define FL_HOOK(name, bytes, writes) \
    extern "C" void __tsan_##name(void* p) { host_cuda::see_if_watched(p, bytes, writes, __builtin_return_address(0)); }
#define FL_HOOKS(bytes)                         \
    FL_HOOK(read##bytes, bytes, false)          \
    FL_HOOK(write##bytes, bytes, true)          \
    FL_HOOK(unaligned_read##bytes, bytes, false) \
    FL_HOOK(unaligned_write##bytes, bytes, true)
FL_HOOKS(1)
FL_HOOKS(2)
FL_HOOKS(4)
FL_HOOKS(8)
FL_HOOKS(16)

extern "C" {
void __tsan_read_range(void* p, size_t bytes) { host_cuda::see_if_watched(p, bytes, false, __builtin_return_address(0)); }
void __tsan_write_range(void* p, size_t bytes) { host_cuda::see_if_watched(p, bytes, true, __builtin_return_address(0)); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void*) {}
void __tsan_vptr_update(void*, void*) {}
// Of the launch code, which is not watched.
int8_t __tsan_atomic8_load(const volatile int8_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
int64_t __tsan_atomic64_load(const volatile int64_t* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }
void __tsan_atomic64_store(volatile int64_t* p, int64_t x, int) { __atomic_store_n(p, x, __ATOMIC_SEQ_CST); }
}
