// Stands in for csrc/cuda/async.cuh, as unkind as the machine may be. A copy arrives when a wait demands it and no
// sooner; until then its bytes are NaN. Its source is read when it is asked for, or when it arrives: one in ascending
// runs, the other in descending ones.
//
// An error: a slot that is read before its copy has been waited for, by another warp than the one that has filled it,
// or by another lane with no barrier between that wait and the read; filled while a copy to it is under way or by
// another warp than before, filled for a row before a lane reads it for the last one, or filled from elsewhere in 128
// bytes than it lies in them, which costs twice the requests; and a copy that a block leaves under way.
#pragma once

#include <deque>
#include <vector>

#include "host_cuda.h"

namespace host_cuda {

class Copies {
  public:
    void ask(void* to, const void* from, int bytes) {
        const Aside aside;
        see_copied(to, from, bytes);
        if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
            fail("a copy is not aligned to its size");
        if (bytes == sizeof(uint4) && (offset(to) - reinterpret_cast<intptr_t>(from)) % 128)
            fail("a copy between different places in 128 bytes");
        Place& place = at(to, bytes);
        if (place.owner != kNobody && place.owner / kWarp != me() / kWarp) fail("two warps copy to one place");
        if (place.pending) fail("a copy to where another one is under way");
        place = {me(), true, 0};
        Copy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, {}};
        memcpy(copy.early, from, bytes);
        memset(to, 0xff, bytes);
        mine().open.push_back(copy);
        ++asked;
    }
    void commit() {
        const Aside aside;
        Thread& thread = mine();
        thread.groups.push_back(std::move(thread.open));
        thread.open.clear();
    }
    void wait(int pending) {
        const Aside aside;
        auto& groups = mine().groups;
        for (; static_cast<int>(groups.size()) > pending; groups.pop_front())
            for (const Copy& copy : groups.front()) {
                see_copied(copy.to, copy.from, copy.bytes);
                memcpy(copy.to, descending ? copy.from : copy.early, copy.bytes);
                Place& place = at(copy.to, copy.bytes);
                place.pending = false;
                place.arrived = block.barriers();
            }
    }
    uint4 read(const uint4* slot) {
        const Aside aside;
        see(slot, sizeof *slot, false, __builtin_return_address(0));
        const Place& place = at(const_cast<uint4*>(slot), sizeof(uint4));
        if (place.owner == kNobody) fail("a slot is read that was never filled");
        if (place.pending) fail("a slot is read whose copy has not been waited for");
        if (place.owner / kWarp != me() / kWarp) fail("a slot of another warp is read");
        if (place.owner != me() && place.arrived == block.barriers())
            fail("a slot of another thread is read before a barrier");
        return *slot;
    }
    // Of a block: its shared memory is about to be another's.
    void end() {
        for (const Thread& thread : threads_) {
            bool under_way = !thread.open.empty();
            for (const auto& group : thread.groups) under_way |= !group.empty();
            if (under_way) fail("a block has ended with copies under way");
        }
        threads_.clear();
        places_.clear();
    }

    int64_t asked = 0;

  private:
    static constexpr unsigned kNobody = ~0u;

    struct Copy {
        char* to;
        const char* from;
        int bytes;
        char early[16];
    };
    struct Thread {
        std::vector<Copy> open;
        std::deque<std::vector<Copy>> groups;
    };
    struct Place {
        unsigned owner = kNobody;
        bool pending = false;
        int arrived = 0;  // after so many barriers
    };

    // When it is asked for and when it arrives: at one of the two, or between them, it happens.
    static void see_copied(const void* to, const void* from, int bytes) {
        see(from, bytes, false, __builtin_return_address(0));
        see(to, bytes, true, __builtin_return_address(0));
    }
    static unsigned me() { return static_cast<unsigned>(block.running()); }
    Thread& mine() {
        threads_.resize(block.threads.x * block.together());
        return threads_[me()];
    }
    static int64_t offset(const void* shared) { return static_cast<const char*>(shared) - block.shared(block.rank()); }
    Place& at(const void* p, int bytes) {
        const int64_t offset = Copies::offset(p), places = block.shared_bytes / 4 + 1;
        if (offset < 0 || offset + bytes > static_cast<int64_t>(block.shared_bytes))
            fail("a place outside shared memory");
        places_.resize(places * block.together());
        return places_[places * block.rank() + offset / 4];
    }

    std::vector<Thread> threads_;
    std::vector<Place> places_;
};

inline Copies copies;
inline const bool told_of_block_ends = (block.ended = [] { copies.end(); }, true);

}  // namespace host_cuda

namespace fused_losses {

inline void copy_async(uint4* shared, const uint4* global) { host_cuda::copies.ask(shared, global, sizeof(uint4)); }
template <class Number>
void copy_async(Number* shared, const Number* global) {
    host_cuda::copies.ask(shared, global, sizeof(Number));
}
inline void commit_copies() { host_cuda::copies.commit(); }
inline void commit_nothing(int some) {
    for (int i = 0; i < (some & 15); ++i) commit_copies();
}
template <int kPending>
void wait_copies() {
    host_cuda::copies.wait(kPending);
}
inline uint4 read_slot(const uint4* slot) { return host_cuda::copies.read(slot); }
inline void write_slot(uint4* slot, const uint4& vector) {
    host_cuda::copies.read(slot);
    *slot = vector;
}

template <class T>
T exchange_in_slot(uint4* slot, int i, T other) {
    host_cuda::copies.read(slot);
    T there;
    memcpy(&there, reinterpret_cast<char*>(slot) + i * sizeof(T), sizeof(T));
    memcpy(reinterpret_cast<char*>(slot) + i * sizeof(T), &other, sizeof(T));
    return there;
}

// A hint, but of what may be read, and aligned.
inline void prefetch(const void* from, int bytes) {
    const host_cuda::Aside aside;
    if (bytes > 0 && (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)) host_cuda::fail("a misaligned prefetch");
    const volatile char* bytes_of = static_cast<const volatile char*>(from);
    for (int i = static_cast<int>(threadIdx.x % 32) * 16; i < bytes; i += 32 * 16) (void)bytes_of[i];
}

}  // namespace fused_losses
