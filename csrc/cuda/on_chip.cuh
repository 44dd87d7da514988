// An engine: a row lives on one multiprocessor, or on a pair of them, each with a half (team.cuh). Its vectors are
// copied once from memory to shared memory and swept twice there; what does not fit is read twice, the second time from
// L2.
//
//     sweep 1    waits for the oldest copies, chunk by chunk
//     sweep 2    copies the next row into each slot that it has emptied
//
// so that memory always has something to do: stores and loads of neighbouring rows, with one barrier per row, that of
// the reduction. A slot belongs to one warp. In sweep 1 the thread that has filled it reads it; in sweep 2, behind the
// barrier, the one whose store then covers whole lines. Program order, wait_copies, that barrier, and a __syncwarp
// before a lane fills what another has read are all the order there has to be. Nothing waits in a loop.
//
//     chunk      kSlots * blockDim.x neighbouring vectors, kSlots * 32 of them of one warp, every 32nd of one thread
//     group      the copies of a chunk, which arrive together. A row has kGroups, whatever its length, the last ones
//                empty: to wait for a chunk is then to wait for all but a constant number of groups
//
// The copies alone keep memory busy. A load into a register that is issued ahead does not: it holds one of a warp's six
// scoreboards, which the loops need, and the first to wait for that one waits for the load.
//
// Edges, phases and the order of sums are as in two_sweeps.cuh: a warp takes the vectors of a chunk one by one where
// the row ends or an element is left out, and no other warp does.
//
// Where levels are costly and as wide as their logits, sweep 1 leaves those of a cheap chunk in the logits' slots, and
// sweep 2 makes none of them again. A costly chunk keeps its logits: far out a level is a rounded 1, and has no slope.
#pragma once

#include <type_traits>

#include "async.cuh"
#include "block.cuh"
#include "two_sweeps.cuh"

namespace fused_losses {

constexpr int kSlots = 4;    // of a thread per chunk: what a sweep holds in registers at a time
constexpr int kGroups = 14;  // the largest shared memory, 227 KB, in chunks of 256 threads
static_assert(kSlots == kUnroll, "FoldedOnline sums for both engines");

// Whether the slots of a cheap chunk take its levels.
template <class Z, class T>
constexpr bool kKeepsLevels = Z::kCostly && sizeof(T) == sizeof(float);

// As Online, with folded exponents. The maximum starts where it is known to be far: of masks like -1e30 alone, which
// a thread may have for its share, a fold would make infinities.
template <class Sums, class Z>
class FoldedOnline {
  public:
    __device__ __forceinline__ explicit FoldedOnline(const Z& z)
        : z_(z), max_(z.floor(2.f * Folded<Z>::kFar)), exponent_(z, start()), cheap_to_(cheap_above(start())) {}

    // The vectors u for which inside(u). One rescale per call; summed in three levels, as by DistantOnline.
    template <class T, class Inside>
    __device__ __forceinline__ void add(const uint4 (&vectors)[kSlots], Inside inside) {
        PackedMax<T> max;
#pragma unroll
        for (int u = 0; u < kSlots; ++u)
            if (inside(u)) max.add(vectors[u]);
        rise(max.with(max_));
        sums_ += chunk_sums<T, Sums, Z>(vectors, inside, [&](float x) { return exponent_(z_.level(x)); });
    }
    // The same of all vectors if their levels are cheap in all threads of the warp, which take the logits' places if
    // they are kept; else nothing, and false. Pairs: of the sums that are wanted.
    template <class T, class Pairs>
    __device__ __forceinline__ bool add_cheap(uint4 (&vectors)[kSlots]) {
        PackedMax<T> max(vectors[0]);
        PackedMin<T> min(vectors[0]);
#pragma unroll
        for (int u = 1; u < kSlots; ++u) {
            max.add(vectors[u]);
            min.add(vectors[u]);
        }
        const float most = max.get();
        if (__any_sync(kFullMask, !((most <= cheap_to_) & (min.get() >= -z_.cheap_to)))) return false;
        max_ = fmaxf(max_, most);
        if constexpr (kKeepsLevels<Z, T>) {
            add_pairs<T, Pairs>(vectors, [&](float2& x) { return exponent_(x = z_.cheap_level(x)); });
        } else {
            const typename Z::CheapExponent exponent(z_, exponent_.top());
            add_pairs<T, Pairs>(vectors, [&](float2& x) { return exponent(x); });
        }
        return true;
    }
    __device__ __forceinline__ void add(float x) {
        rise(fmaxf(max_, x));
        add_to(sums_, exponent_(z_.level(x)));
    }
    // A vector without element left_out, whose logit is returned.
    template <class T>
    __device__ __forceinline__ float add_without(const uint4& vector, int left_out) {
        float x[kWidth<T>], max = max_, found = 0.f;
        unpack<T>(vector, x);
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) {
            if (i == left_out)
                found = x[i];
            else
                max = fmaxf(max, x[i]);
        }
        rise(max);
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i)
            if (i != left_out) add_to(sums_, exponent_(z_.level(x[i])));
        return found;
    }

    __device__ __forceinline__ Online<Sums> all() {
        if constexpr (Z::kCostly) rise(max_);
        sums_.rescale(-exponent_.excess(), exponent_.correction());
        return {max_, sums_};
    }

  private:
    __device__ __forceinline__ float start() const {
        if constexpr (Z::kCostly) {
            return z_.start();
        } else {
            return max_;
        }
    }
    __device__ __forceinline__ float cheap_above(float from) const {
        if constexpr (Z::kCostly) {
            return fminf(z_.cheap_to, z_.little_above(from));
        } else {
            return 0.f;
        }
    }
    // All vectors, two elements at a time. exponents: of two logits, in whose places it may leave their levels.
    template <class T, class Pairs, class Exponents>
    __device__ __forceinline__ void add_pairs(uint4 (&vectors)[kSlots], Exponents exponents) {
        constexpr int kTogether = sizeof(T);  // vectors: 8 pairs are summed before they are added to others
        Pairs chunk{}, sums{};
#pragma unroll
        for (int u = 0; u < kSlots; ++u) {
            float x[kWidth<T>];
            unpack<T>(vectors[u], x);
#pragma unroll
            for (int i = 0; i < kWidth<T>; i += 2) {
                float2 pair{x[i], x[i + 1]};
                const float2 to_add = exponents(pair);
                if (i == 0 && u % kTogether == 0)
                    sums = Pairs::of(to_add);
                else
                    sums.add_pair(to_add);
                x[i] = pair.x;
                x[i + 1] = pair.y;
            }
            if constexpr (kKeepsLevels<Z, T>) vectors[u] = pack<T>(x);
            if (u == kTogether - 1)
                chunk = sums;
            else if ((u + 1) % kTogether == 0)
                chunk += sums;
        }
        sums_ += chunk;
    }
    __device__ __forceinline__ void rise(float max) {
        const Folded<Z> risen(z_, max);
        const float exponent = exponent_.top() - risen.top();
        sums_.rescale(exponent, exp2_approx(exponent));
        exponent_ = risen;
        max_ = max;
        cheap_to_ = cheap_above(max);
    }
    static __device__ __forceinline__ void add_to(Sums& sums, float exponent) { sums.template add<Z>(exponent); }

    const Z z_;
    float max_;
    Folded<Z> exponent_;  // counted from the maximum, or where levels are costly from what it was a while ago
    float cheap_to_;      // the largest logit that is cheap, and little above what exponents are counted from
    Sums sums_;
};

// What of a row is this thread's. The same for the vectors on chip and for the rest.
template <class T>
struct Share : Span<T> {
    static constexpr int kPiece = kSlots * kWarp;  // vectors of a warp in a chunk

    int step;   // vectors in a chunk
    int first;  // this thread's in the first chunk
    int whole;  // chunks of which this warp has all its vectors
    int some;   // of which it has some

    __device__ __forceinline__ Share(const Span<T>& span, int log_step) : Span<T>(span), step(1 << log_step) {
        const int warp = static_cast<int>(threadIdx.x / kWarp) * kPiece;
        first = warp + threadIdx.x % kWarp;
        whole = (this->vectors - warp - kPiece + step) >> log_step;  // not negative: a warp's piece is within a chunk
        some = (this->vectors - warp - 1 + step) >> log_step;
    }
    __device__ __forceinline__ bool has(int chunk, int u) const {
        return chunk * step + first + u * kWarp < this->vectors;
    }
};

// Where an element of a row is: its vector, -1 at an edge, and its threads, in sweep 1 and in sweep 2.
struct Place {
    int element, vector, owner, writer;
};

template <class T>
class OnChip {
  public:
    // slots: `chunks` times 2^log_step, which is kSlots * blockDim.x. At most kGroups chunks.
    __device__ __forceinline__ OnChip(uint4* slots, int chunks, int log_step)
        : slots_(slots + threadIdx.x / kWarp * Share<T>::kPiece), chunks_(chunks), log_step_(log_step) {}

    // Begins to copy a row, which may be none, into slots that no thread of the warp needs any more. span: the row's;
    // of none, empty.
    __device__ __forceinline__ void fetch(const T* row, const Span<T>& span) const {
        const Share<T> share = share_of(span);
        const uint4* const from = vectors_of(row, share);
        uint4* const slots = slots_of(row, share);
        for (int c = 0; c < chunks_; ++c) copy_chunk(share, from, slots, c);
        fill_groups();
    }

    // Until the first group of the row that was fetched last has arrived; that of none is empty, but for what has been
    // asked for beside it.
    __device__ __forceinline__ void wait_first() const { wait_copies<kGroups - 1>(); }

    // Brings the beginning of a row to L2 while the slots are still in use: memory has work while the row that has
    // come is summed and its end reduced. By a warp.
    static __device__ __forceinline__ void announce(const T* row, const Span<T>& span, int vectors) {
        prefetch(row + span.head, 16 * min_of(vectors, span.vectors));
    }

    // Of element j of a row whose gradient is `out`; none: -1.
    __device__ __forceinline__ Place place_of(const Span<T>& span, int j, const T* out) const {
        if (j < 0) return {-1, -1, -1, -1};
        const int v = span.vector_of(j);
        if (v < 0) {
            const int edge = j < span.head ? j : j - span.vectors * kWidth<T>;
            return {j, v, edge, edge};
        }
        const int warp = (v & ((1 << log_step_) - 1)) / Share<T>::kPiece * kWarp;
        return {j, v, warp + v % kWarp, warp + (v + in_line(out + span.head)) % kWarp};
    }

    // This thread's share of the row that was fetched last, without the element left_out, or all of it where there is
    // none. Its owner calls found with its logit. mass_only: whether of Sums nothing but the sum is wanted, which saves
    // where levels are cheap. costly: of Z::kCostly, bits of the chunks that were not.
    template <class Sums, class Z, class Found>
    __device__ __forceinline__ Online<Sums> sum(const T* row, const Span<T>& span, const Place& left_out, const Z& z,
                                                const Found& found, bool mass_only, uint32_t& costly) const {
        const Share<T> share = share_of(span);
        const unsigned thread = threadIdx.x;
        const bool owns = static_cast<int>(thread) == left_out.owner;
        const bool near = left_out.vector >= 0 && static_cast<unsigned>(left_out.owner) / kWarp == thread / kWarp;
        int apart = near ? left_out.vector >> log_step_ : -1;  // the chunk in which this warp takes care
        const bool owns_edge = owns && left_out.vector < 0;
        const bool on_edge = static_cast<int>(thread) < share.edges;
        const float of_edge = on_edge ? to_float(row[share.edge(thread)]) : 0.f;  // on its way while vectors are summed
        const uint4* const rest = vectors_of(row, share);
        uint4* const slots = slots_of(row, share);
        FoldedOnline<Sums, Z> acc(z);
        // Where -inf adds nothing, it takes the element's place in its slot, and the vector is one like all others.
        const bool takes = Sums::kMassOnly && near && apart < chunks_;
        const int skipped = takes ? -1 : left_out.vector;
        const auto slot_of_it = [&] {
            return slots + place(left_out.vector >> log_step_, static_cast<unsigned>(left_out.vector) / kWarp % kSlots);
        };
        const auto place_in_it = [&] { return static_cast<unsigned>(left_out.element - share.head) % kWidth<T>; };

        // Chunks c to end - 1. read: the vectors; keep: what add_cheap has left of them; done: with the chunk.
        const auto walk = [&](int c, int end, auto read, auto keep, auto done, auto take) {
            while (c < end) {
                uint4 raw[kSlots];
                const int stop = min_of(end, c <= apart ? apart : share.whole);
                const auto all = [](int) { return true; };
                if constexpr (Z::kCostly) {
                    const auto add_cheap = [&](auto pairs) {
                        for (; c < stop; ++c) {
                            read(c, raw, all);
                            if (!acc.template add_cheap<T, decltype(pairs)>(raw)) return;
                            keep(c, raw);
                            done();
                        }
                    };
                    if (mass_only)
                        add_cheap(Sum::Pairs());
                    else
                        add_cheap(typename Sums::Pairs());
                } else {
                    for (; c < stop; ++c) {
                        read(c, raw, all);
                        acc.template add<T>(raw, all);
                        done();
                    }
                }
                if (c == end) break;
                if (take(c)) continue;
                if (Z::kCostly && c < kBits) costly |= 1u << c;
                const auto inside = [&](int u) {
                    return share.has(c, u) && c * share.step + share.first + u * kWarp != skipped;
                };
                read(c, raw, inside);
                acc.template add<T>(raw, inside);
                done();
                ++c;
            }
        };
        walk(
            0, chunks_,
            [&](int c, uint4(&raw)[kSlots], auto inside) {
                // Groups that were closed after chunk c's: those behind it in its row, and c of this sweep.
                wait_copies<kGroups - 1>();
#pragma unroll
                for (int u = 0; u < kSlots; ++u) raw[u] = inside(u) ? read_slot(slots + place(c, u)) : uint4{};
            },
            [&](int c, const uint4(&levels)[kSlots]) {
                if constexpr (kKeepsLevels<Z, T>) {
#pragma unroll
                    for (int u = 0; u < kSlots; ++u) write_slot(slots + place(c, u), levels[u]);
                }
            },
            commit_copies,
            [&](int c) {
                if (!takes || c != apart) return false;
                wait_copies<kGroups - 1>();
                if (owns) found(to_float(exchange_in_slot(slot_of_it(), place_in_it(), lowest<T>())));
                apart = -1;
                return true;
            });
        walk(
            chunks_, share.some,
            [&](int c, uint4(&raw)[kSlots], auto inside) {
#pragma unroll
                for (int u = 0; u < kSlots; ++u)
                    raw[u] = inside(u) ? load_kept(rest + c * share.step + u * kWarp) : uint4{};
            },
            [](int, const uint4(&)[kSlots]) {}, [] {}, [](int) { return false; });
        if (on_edge && !owns_edge) acc.add(of_edge);
        if (owns && !takes) {
            const bool in_slot = !Sums::kMassOnly && left_out.vector >> log_step_ < chunks_;
            const auto vector = [&] {
                return in_slot ? read_slot(slot_of_it()) : load_kept(rest + (left_out.vector - share.first));
            };
            found(owns_edge ? of_edge : acc.template add_without<T>(vector(), place_in_it()));
        }
        return acc.all();
    }

    // out_j = f(in_j), out of the slots, and the next row, which may be none, into them. in and out have the same phase
    // and may be the same. span, next_span: of in and of next.
    // cheap: f in the chunks that are cheap to Z; kept: the same of what is in the slots where that is levels.
    template <class Z, class F, class Cheap, class Kept>
    __device__ __forceinline__ void map(const T* in, T* out, const Span<T>& span, const T* next,
                                        const Span<T>& next_span, const F& f, const Cheap& cheap, const Kept& kept,
                                        uint32_t costly) const {
        const auto& in_slot = either<kKeepsLevels<Z, T>>(kept, cheap);
        const auto is_cheap = [&](int c) { return !Z::kCostly || (c < kBits && !(costly >> c & 1)); };
        const Share<T> share = share_of(span);
        if (static_cast<int>(threadIdx.x) < share.edges) {
            const int edge = share.edge(threadIdx.x);
            assign(out[edge], f(to_float(in[edge])));
        }
        const Turned mine = turned(in, out, share);
        uint4* const to = reinterpret_cast<uint4*>(out + share.head) + mine.first;
        uint4* chunk = to + static_cast<int64_t>(share.some) * share.step;
        const auto write = [&](int u, const uint4& v) { store_streaming(chunk + mine.at(u), v); };
        const auto all = [](int) { return true; };
        // Backwards, and before what is on chip: what was read last L2 still has.
        const uint4* rest = reinterpret_cast<const uint4*>(in + share.head) + mine.first + (chunk - to);
        for (int c = share.some - 1; c >= chunks_; --c) {
            chunk -= share.step;
            rest -= share.step;
            const auto read = [&](int u) { return load_last(rest + mine.at(u)); };
            if (c < share.whole && is_cheap(c))
                map_chunk(read, write, cheap, all);
            else
                map_end<Z::kCostly>(read, write, f, [&](int u) { return mine.has(share, c, u); });
        }
        chunk = to;
        const Share<T> coming = share_of(next_span);
        const uint4* from = vectors_of(next, coming);
        const uint4* slots = slots_ + mine.slot;
        uint4* next_slots = slots_of(next, coming);
        const auto read = [&](int u) { return read_slot(slots + mine.at(u)); };
        const auto go_on = [&] {
            commit_copies();
            chunk += share.step;
            from += share.step;
            slots += share.step;
            next_slots += share.step;
        };
        const int whole = min_of(chunks_, next ? min_of(share.whole, coming.whole) : share.whole);
        for (int c = 0; c < chunks_; ++c) {
            const int stop = Z::kCostly ? min_of(whole, c + zeros_below(costly >> c)) : whole;
            for (; c < stop; ++c) {
                map_chunk(read, write, in_slot, all);
                if (next) {
                    __syncwarp();
#pragma unroll
                    for (int u = 0; u < kSlots; ++u) copy_async(next_slots + u * kWarp, from + u * kWarp);
                }
                go_on();
            }
            if (c == chunks_) break;
            const auto inside = [&](int u) { return mine.has(share, c, u); };
            if (kKeepsLevels<Z, T> && is_cheap(c))
                map_end<false>(read, write, kept, inside);
            else
                map_end<Z::kCostly>(read, write, f, inside);
            __syncwarp();
#pragma unroll 1
            for (int u = 0; u < kSlots; ++u)
                if (coming.has(c, u)) copy_async(next_slots + u * kWarp, from + u * kWarp);
            go_on();
        }
        fill_groups();
    }

  private:
    static constexpr int kBits = 32;  // chunks beyond are few, and taken for costly

    static __device__ __forceinline__ int min_of(int a, int b) { return a < b ? a : b; }

    __device__ __forceinline__ Share<T> share_of(const Span<T>& span) const { return {span, log_step_}; }
    // This thread's, from the first chunk on.
    static __device__ __forceinline__ const uint4* vectors_of(const T* row, const Share<T>& share) {
        return reinterpret_cast<const uint4*>(row + share.head) + share.first;
    }
    // This thread's first slot for a row. Lanes are turned so that slots have the row's phase modulo 128 bytes: a copy
    // between two phases costs twice the requests.
    __device__ __forceinline__ uint4* slots_of(const T* row, const Share<T>& share) const {
        return slots_ + (threadIdx.x + in_line(row + share.head)) % kWarp;
    }

    // As Written, of a chunk's vectors: the first lanes of a warp are one turn behind the others, and begin with the
    // last vectors of its piece instead. Three stores of four are then of four whole lines, and not of three and two
    // parts.
    struct Turned {
        int first;  // this thread's vector in the first chunk, but for
        int last;   // what is added in its first turn
        int slot;   // of `first`, among the warp's

        __device__ __forceinline__ int at(int u) const { return u == 0 ? last : u * kWarp; }
        __device__ __forceinline__ bool has(const Share<T>& share, int chunk, int u) const {
            return chunk * share.step + first + at(u) < share.vectors;
        }
    };
    __device__ __forceinline__ Turned turned(const T* in, const T* out, const Share<T>& share) const {
        const int lane = threadIdx.x % kWarp, lines = in_line(out + share.head);
        const int slot = (lane - lines + in_line(in + share.head)) & (kWarp - 1);
        const bool behind = lane < lines;
        return {share.first - lines, behind ? Share<T>::kPiece : 0, behind ? slot - kWarp : slot};
    }
    __device__ __forceinline__ int place(int c, int u) const { return (c << log_step_) + u * kWarp; }
    __device__ __forceinline__ void copy_chunk(const Share<T>& share, const uint4* from, uint4* slots, int c) const {
#pragma unroll
        for (int u = 0; u < kSlots; ++u)
            if (share.has(c, u)) copy_async(slots + place(c, u), from + c * share.step + u * kWarp);
        commit_copies();
    }
    // One for each chunk that a row could have and has not.
    __device__ __forceinline__ void fill_groups() const {
        static_assert(kGroups < 16, "four bits");
        commit_nothing(kGroups - chunks_);
    }

    template <bool first, class A, class B>
    static __device__ __forceinline__ const auto& either(const A& a, const B& b) {
        if constexpr (first) {
            return a;
        } else {
            return b;
        }
    }
    // Of a chunk that a warp has not all of, or that is costly. Most rows have one of the former at most: vector by
    // vector, what it would take beside them is not formed before the others. kMany: they may have many of the latter.
    template <bool kMany, class Read, class Write, class F, class Inside>
    static __device__ __forceinline__ void map_end(Read read, Write write, const F& f, Inside inside) {
        if constexpr (kMany) {
            map_chunk(read, write, f, inside);
        } else {
#pragma unroll 1
            for (int u = 0; u < kSlots; ++u)
                if (inside(u)) write(u, mapped(read(u), f));
        }
    }
    template <class F>
    static __device__ __forceinline__ uint4 mapped(const uint4& vector, const F& f) {
        float x[kWidth<T>];
        unpack<T>(vector, x);
        if constexpr (std::is_invocable_v<F, float2>) {
#pragma unroll
            for (int i = 0; i < kWidth<T>; i += 2) {
                const float2 pair = f(float2{x[i], x[i + 1]});
                x[i] = pair.x;
                x[i + 1] = pair.y;
            }
        } else {
#pragma unroll
            for (int i = 0; i < kWidth<T>; ++i) x[i] = f(x[i]);
        }
        return pack<T>(x);
    }
    template <class Read, class Write, class F, class Inside>
    static __device__ __forceinline__ void map_chunk(Read read, Write write, const F& f, Inside inside) {
        uint4 raw[kSlots];
#pragma unroll
        for (int u = 0; u < kSlots; ++u) raw[u] = inside(u) ? read(u) : uint4{};
#pragma unroll
        for (int u = 0; u < kSlots; ++u)
            if (inside(u)) write(u, mapped(raw[u], f));
    }

    uint4* const slots_;  // this warp's
    const int chunks_, log_step_;
};

}  // namespace fused_losses
