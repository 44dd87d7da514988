// An engine: how a block of threads walks over a row, here twice. 16-byte vectors with a peeled head and tail, so that
// an odd V or an odd row start costs at most 14 elements handled one by one, never the vector width. What is summed and
// what is sent back is the row's business: plain_row.cuh, terms_row.cuh.
//
// A sweep gives every thread a fixed set of elements, and the thread that owns an element is known without searching:
// Written::owner. Indices in a row are int (V < 2^31); only row offsets are int64.
//
// Which thread adds what, and in which order, is decided by V, the element type, the number of threads, the element
// that is left out, and the row's phase: its address modulo 16. So rows of one phase, as all are where V elements are a
// multiple of 16 bytes, get the same bits in any batch and at any place; of an odd V in 16 bits it is every eighth row.
// For one order in all phases a vector would have to be put together from two: 8.8 instructions per element instead of
// 6.8 in this sweep (float32: 10.4 instead of 6.6), and twice the loads.
#pragma once

#include "sums.cuh"
#include "vector.cuh"

namespace fused_losses {

constexpr int kMaxThreads = 1024;

// Vectors that a thread loads, and holds, at a time: 64 bytes in flight per thread and 64 KB per multiprocessor, where
// 4.8 TB/s need about 25. Twice as many spill.
constexpr int kUnroll = 4;

// Row = head elements | vectors | tail elements. Head and tail are the edges: thread i has edge element i. A block has
// a warp at least, which is enough where shrink() has added a vector at either end.
static_assert(2 * 7 + 2 * 8 <= kWarp, "edges without a thread");

template <class T>
struct Span {
    int head;
    int vectors;
    int edges;

    __device__ __forceinline__ Span() : head(0), vectors(0), edges(0) {}  // of no row
    // Vectors aligned in `row`.
    __device__ __forceinline__ Span(const T* row, int vocab) {
        const int to_boundary = static_cast<int>((0 - reinterpret_cast<uintptr_t>(row)) % 16 / sizeof(T));
        head = to_boundary < vocab ? to_boundary : vocab;
        vectors = (vocab - head) / kWidth<T>;
        edges = vocab - vectors * kWidth<T>;
    }

    // One vector less at either end. Their elements become edges: at most 30, and there are 32 threads.
    __device__ __forceinline__ void shrink() {
        const int fewer = vectors < 2 ? vectors : 2;
        head += vectors > 0 ? kWidth<T> : 0;
        vectors -= fewer;
        edges += fewer * kWidth<T>;
    }

    __device__ __forceinline__ int edge(int i) const { return i < head ? i : i + vectors * kWidth<T>; }

    // That holds element j, or -1 where an edge or no row does.
    __device__ __forceinline__ int vector_of(int j) const {
        const int body = j - head;
        return body >= 0 && body < vectors * kWidth<T> ? body / kWidth<T> : -1;
    }
};

constexpr int kLine = 128 / sizeof(uint4);  // vectors: what memory and caches move at once

// How many vectors after the beginning of a line.
__device__ __forceinline__ int in_line(const void* p) {
    return static_cast<int>(reinterpret_cast<uintptr_t>(p) / sizeof(uint4) % kLine);
}

// A row to be written. Its vectors are dealt out from the beginning of the line that the first one is in: but for the
// first of a block, all stores of a warp are of whole lines. By the order of the sums, which no line may change, they
// would cover parts of two lines more.
template <class T>
struct Written : Span<T> {
    int before;  // vectors of the line

    __device__ __forceinline__ explicit Written(const Span<T>& span, const T* row)
        : Span<T>(span), before(in_line(row + span.head)) {}

    // This thread's first vector; it has every blockDim.x-th from there on.
    __device__ __forceinline__ int first() const {
        const int vector = static_cast<int>(threadIdx.x) - before;
        return vector < 0 ? vector + static_cast<int>(blockDim.x) : vector;
    }
    // The thread that writes element j.
    __device__ __forceinline__ int owner(int j) const {
        if (j < this->head) return j;
        const int vector = (j - this->head) / kWidth<T>;
        return vector < this->vectors ? (vector + before) % blockDim.x : j - this->vectors * kWidth<T>;
    }
};

// ---- Sweep 1: maximum and sums ------------------------------------------------------------------------------------

// Of the vectors u for which inside(u), in two levels, within a vector and over the chunk. exponent: of a logit.
template <class T, class Sums, class Z, class Inside, class Exponent>
__device__ __forceinline__ Sums chunk_sums(const uint4 (&vectors)[kUnroll], Inside inside, Exponent exponent) {
    Sums chunk;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        if (!inside(u)) continue;
        float x[kWidth<T>];
        unpack<T>(vectors[u], x);
        Sums sums;
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) sums.template add<Z>(exponent(x[i]));
        chunk += sums;
    }
    return chunk;
}

// A thread's sums over what it is given, wherever that lies: exponents are Distances.
template <class Sums, class Z>
class DistantOnline {
  public:
    __device__ __forceinline__ explicit DistantOnline(const Z& z) : z_(z) {}

    // The vectors u for which inside(u). One rescale per call, not per element: ex2 is what a sweep has least of (16
    // per clock and SM). Summed in three levels, within a vector, a chunk and the row, so that rounding grows with none
    // of them alone.
    template <class T, class Inside>
    __device__ __forceinline__ void add(const uint4 (&vectors)[kUnroll], Inside inside) {
        PackedMax<T> max;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            if (inside(u)) max.add(vectors[u]);
        const float top = online_.rescale(max.with(online_.max), z_);
        online_.sums +=
            chunk_sums<T, Sums, Z>(vectors, inside, [&](float x) { return z_.exponent(z_.level(x) - top); });
    }
    __device__ __forceinline__ void add(float x) { online_.add(x, z_); }
    __device__ __forceinline__ Online<Sums> all() const { return online_; }

  private:
    const Z z_;
    Online<Sums> online_;
};

// This thread's share of the row without element left_out, or of all of it where that is -1. Adds: DistantOnline, or
// another that does for the row.
//
// No comparison per element: all threads go through the chunk with the left-out element as through the last one, vector
// by vector, and leave out its vector. What else is in that goes to one thread each, as the edges do.
template <class Sums, template <class, class> class Adds = DistantOnline, class T, class Z>
__device__ __forceinline__ Online<Sums> sum_row(const T* row, int vocab, int left_out, const Z& z) {
    const Span<T> span(row, vocab);
    const int thread = threadIdx.x, step = kUnroll * blockDim.x, left_out_vector = span.vector_of(left_out);
    const uint4* vectors = reinterpret_cast<const uint4*>(row + span.head);
    Adds<Sums, Z> acc(z);
    const auto add = [&](int v, auto inside) {
        uint4 raw[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            raw[u] = inside(u) ? load(vectors + v + u * blockDim.x) : uint4{};  // unset, it would stay live over rows
        acc.template add<T>(raw, inside);
    };
    int v = thread;
    for (int stop = left_out_vector < 0 ? span.vectors : left_out_vector; v - thread < span.vectors;
         v += step, stop = span.vectors) {
        for (const int last = stop - step + thread; v <= last; v += step) add(v, [](int) { return true; });
        add(v, [&](int u) {
            const int at = v + u * static_cast<int>(blockDim.x);
            return at < span.vectors && at != left_out_vector;
        });
    }
    // Last: the vectors beside them have brought their cache lines in. At most 14 + 8 elements, and there are 32
    // threads.
    const int beside = thread - span.edges;
    if (beside < (left_out_vector < 0 ? 0 : kWidth<T>)) {
        const int j = beside < 0 ? span.edge(thread) : span.head + left_out_vector * kWidth<T> + beside;
        if (j != left_out) acc.add(to_float(row[j]));
    }
    return acc.all();
}

// ---- Sweep 2: out_j = f(in_j) -------------------------------------------------------------------------------------

template <bool skewed>
constexpr int kMapUnroll = skewed ? kUnroll / 2 : kUnroll;  // a skewed vector is two loads

template <class T, bool skewed, class F, class Inside>
__device__ __forceinline__ void map_chunk(const uint4* in, int skew, uint4* out, const F& f, Inside inside) {
    uint4 raw[kMapUnroll<skewed>];
#pragma unroll
    for (int u = 0; u < kMapUnroll<skewed>; ++u) {
        const uint4* p = in + u * blockDim.x;
        raw[u] = !inside(u) ? uint4{} : skewed ? load_skewed(p, skew) : load_last(p);
    }
#pragma unroll
    for (int u = 0; u < kMapUnroll<skewed>; ++u) {
        if (!inside(u)) continue;
        float x[kWidth<T>];
        unpack<T>(raw[u], x);
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) x[i] = f(x[i]);
        store_streaming(out + u * blockDim.x, pack<T>(x));
    }
}

// Last chunk first: what the previous sweep read last is what the caches still hold, and where the rows in flight
// outgrow them, going back finds some of it while going round in the same order finds none.
//
// first: this thread's vector. Of a chunk that is whole it has all, though it may go on less than a chunk beyond.
template <class T, bool skewed, class F>
__device__ __forceinline__ void map_vectors(const uint4* in, int skew, uint4* out, int first, int vectors, const F& f) {
    const int step = kMapUnroll<skewed> * blockDim.x;
    int v = vectors / step * step + first;
    map_chunk<T, skewed>(in + v, skew, out + v, f,
                         [&](int u) { return v + u * static_cast<int>(blockDim.x) < vectors; });
    for (v -= step; v >= 0; v -= step) map_chunk<T, skewed>(in + v, skew, out + v, f, [](int) { return true; });
}

// How many bytes in lies after a multiple of 16 that out lies on.
template <class T>
__device__ __forceinline__ int skew_of(const T* in, const T* out) {
    return static_cast<int>((reinterpret_cast<uintptr_t>(in) - reinterpret_cast<uintptr_t>(out)) % 16);
}

// out may be in. Vectors are aligned in out; where in has another phase (a strided view beside a contiguous buffer,
// odd V), each is put together from two aligned loads, and the span shrinks so that both lie within the row.
// What is returned knows which thread wrote an element.
template <class T, class F>
__device__ __forceinline__ Written<T> map_row(const T* in, T* out, int vocab, const F& f) {
    Span<T> shrunk(out, vocab);
    const int skew = skew_of(in, out);
    if (skew) shrunk.shrink();
    const Written<T> span(shrunk, out);
    if (static_cast<int>(threadIdx.x) < span.edges) {
        const int edge = span.edge(threadIdx.x);
        assign(out[edge], f(to_float(in[edge])));
    }
    uint4* to = reinterpret_cast<uint4*>(out + span.head);
    if (skew) {
        const char* aligned = reinterpret_cast<const char*>(in + span.head) - skew;
        map_vectors<T, true>(reinterpret_cast<const uint4*>(aligned), skew, to, span.first(), span.vectors, f);
    } else {
        map_vectors<T, false>(reinterpret_cast<const uint4*>(in + span.head), 0, to, span.first(), span.vectors, f);
    }
    return span;
}

// +0 everywhere; reads nothing.
template <class T>
__device__ __forceinline__ void zero_row(T* out, int vocab) {
    const Written<T> span(Span<T>(out, vocab), out);
    if (static_cast<int>(threadIdx.x) < span.edges) assign(out[span.edge(threadIdx.x)], 0.f);
    uint4* vectors = reinterpret_cast<uint4*>(out + span.head);
#pragma unroll 4
    for (int v = span.first(); v < span.vectors; v += blockDim.x) store_streaming(vectors + v, {0, 0, 0, 0});
}

}  // namespace fused_losses
