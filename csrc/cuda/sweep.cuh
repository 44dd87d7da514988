// How a block of threads walks over a row: 16-byte vectors with a peeled head and tail, so that an odd V or an odd row
// start costs at most 14 elements handled one by one, never the vector width.
//
// A sweep gives every thread a fixed set of elements, and the thread that owns an element is known without searching:
// Span::owner. Indices in a row are int (V < 2^31); only row offsets are int64.
#pragma once

#include "transform.cuh"
#include "vector.cuh"

namespace fused_losses {

constexpr int kMinThreads = 32;  // not less: each edge element of a row needs a thread of its own
constexpr int kMaxThreads = 1024;

// Vectors that a thread loads, and holds, at a time: 64 bytes in flight per thread and 64 KB per multiprocessor, where
// 4.8 TB/s need about 25. Twice as many spill.
constexpr int kUnroll = 4;

// Row = head elements | vectors | tail elements. Head and tail are the edges: thread i has edge element i.
template <class T>
struct Span {
    int head;
    int vectors;
    int edges;

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

    __device__ __forceinline__ int owner(int j) const {
        if (j < head) return j;
        const int body = j - head;
        return body < vectors * kWidth<T> ? body / kWidth<T> % blockDim.x : j - vectors * kWidth<T>;
    }
};

// ---- Sweep 1: maximum and sums ------------------------------------------------------------------------------------

// e_j = 2^exponent(level_j - top) over the elements seen so far, top being the level of their maximum. What is
// subtracted first costs no digits: a large common offset leaves the sums as they are.
struct Sum {
    float sum = 0.f;  // of e_j

    // shift: the old top less the new one
    template <class Z>
    __device__ __forceinline__ void rescale(float shift, const Z& z) {
        sum *= exp2_approx(z.exponent(shift));
    }
    // distance: level_j - top
    template <class Z>
    __device__ __forceinline__ void add(float distance, const Z& z) {
        sum += exp2_approx(z.exponent(distance));
    }
    __device__ __forceinline__ void operator+=(const Sum& other) { sum += other.sum; }
};

// Of an exponent where it meets e_j, which is 0 there: 0 * -inf would be NaN. A NaN is lost here, but not in e_j.
constexpr float kLowestExponent = -1000.f;

// What losses with terms need beside the sum. All summands have one sign: nothing cancels.
struct Moments {
    float sum = 0.f;
    float moment = 0.f;  // of e_j log2(e_j)
    float linear = 0.f;  // of level_j - top; -inf if a level is
    float count = 0.f;   // of elements, which linear needs when top moves; constants that the compiler adds up

    // A shift from the floor can overflow, when all sums are 0.
    template <class Z>
    __device__ __forceinline__ void rescale(float shift, const Z& z) {
        const float exponent = z.exponent(shift), e = exp2_approx(exponent);
        moment = e * (moment + fmaxf(exponent, kLowestExponent) * sum);
        sum *= e;
        linear += count * fmaxf(shift, kFloor);
    }
    template <class Z>
    __device__ __forceinline__ void add(float distance, const Z& z) {
        const float exponent = z.exponent(distance), e = exp2_approx(exponent);
        sum += e;
        moment += e * fmaxf(exponent, kLowestExponent);
        linear += distance;
        count += 1.f;
    }
    __device__ __forceinline__ void operator+=(const Moments& other) {
        sum += other.sum;
        moment += other.moment;
        linear += other.linear;
        count += other.count;
    }
};

// max is a running maximum of raw logits that starts at a finite floor: in an all -inf part (-inf) - (-inf) would be
// NaN. fmaxf drops a NaN, but the sums do not; +inf gives inf - inf there. Either way the row becomes NaN through them.
template <class Sums>
struct Online {
    float max = kFloor;
    Sums sums;

    // Returns the new top.
    template <class Z>
    __device__ __forceinline__ float rescale(float new_max, const Z& z) {
        const float top = z.level(new_max);
        sums.rescale(z.level(max) - top, z);
        max = new_max;
        return top;
    }
    template <class Z>
    __device__ __forceinline__ void add(float x, const Z& z) {
        const float top = rescale(fmaxf(max, x), z);
        sums.add(z.level(x) - top, z);
    }
};

// Adds the vectors u * blockDim.x, u < kUnroll, for which inside(u). One rescale per call, not per element: ex2 is what
// a sweep has least of (16 per clock and SM). Summed in three levels, within a vector, a chunk and the row, so that
// rounding grows with none of them alone.
template <class T, class Sums, class Z, class Inside>
__device__ __forceinline__ void add_chunk(Online<Sums>& acc, const uint4* vectors, const Z& z, Inside inside) {
    uint4 raw[kUnroll];
    float x[kWidth<T>];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u)
        raw[u] = inside(u) ? load(vectors + u * blockDim.x) : uint4{};  // left unset, it would stay live over rows
    float max = acc.max;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        if (!inside(u)) continue;
        unpack<T>(raw[u], x);
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) max = fmaxf(max, x[i]);
    }
    const float top = acc.rescale(max, z);
    Sums chunk;
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
        if (!inside(u)) continue;
        unpack<T>(raw[u], x);
        Sums sums;
#pragma unroll
        for (int i = 0; i < kWidth<T>; ++i) sums.add(z.level(x[i]) - top, z);
        chunk += sums;
    }
    acc.sums += chunk;
}

// This thread's share of the row.
template <class Sums, class T, class Z>
__device__ __forceinline__ Online<Sums> sum_row(const T* row, int vocab, const Z& z) {
    const Span<T> span(row, vocab);
    const int thread = threadIdx.x, step = kUnroll * blockDim.x;
    const uint4* vectors = reinterpret_cast<const uint4*>(row + span.head);
    Online<Sums> acc;
    int v = thread;
    for (const int whole = span.vectors / step * step; v < whole; v += step)
        add_chunk<T>(acc, vectors + v, z, [](int) { return true; });
    add_chunk<T>(acc, vectors + v, z, [&](int u) { return v + u * static_cast<int>(blockDim.x) < span.vectors; });
    // Last: the vectors beside the edges have brought their cache lines in.
    if (thread < span.edges) acc.add(to_float(row[span.edge(thread)]), z);
    return acc;
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
template <class T, bool skewed, class F>
__device__ __forceinline__ void map_vectors(const uint4* in, int skew, uint4* out, int vectors, const F& f) {
    const int thread = threadIdx.x, step = kMapUnroll<skewed> * blockDim.x;
    int v = vectors / step * step + thread;
    map_chunk<T, skewed>(in + v, skew, out + v, f,
                         [&](int u) { return v + u * static_cast<int>(blockDim.x) < vectors; });
    for (v -= step; v >= 0; v -= step) map_chunk<T, skewed>(in + v, skew, out + v, f, [](int) { return true; });
}

// out may be in. Vectors are aligned in out; where in has another phase (a strided view beside a contiguous buffer,
// odd V), each is put together from two aligned loads, and the span shrinks so that both lie within the row.
// The span returned knows which thread wrote an element.
template <class T, class F>
__device__ __forceinline__ Span<T> map_row(const T* in, T* out, int vocab, const F& f) {
    Span<T> span(out, vocab);
    const int skew = static_cast<int>((reinterpret_cast<uintptr_t>(in) - reinterpret_cast<uintptr_t>(out)) % 16);
    if (skew) span.shrink();
    if (static_cast<int>(threadIdx.x) < span.edges) {
        const int edge = span.edge(threadIdx.x);
        assign(out[edge], f(to_float(in[edge])));
    }
    uint4* to = reinterpret_cast<uint4*>(out + span.head);
    if (skew) {
        const char* aligned = reinterpret_cast<const char*>(in + span.head) - skew;
        map_vectors<T, true>(reinterpret_cast<const uint4*>(aligned), skew, to, span.vectors, f);
    } else {
        map_vectors<T, false>(reinterpret_cast<const uint4*>(in + span.head), 0, to, span.vectors, f);
    }
    return span;
}

// +0 everywhere; reads nothing.
template <class T>
__device__ __forceinline__ void zero_row(T* out, int vocab) {
    const Span<T> span(out, vocab);
    if (static_cast<int>(threadIdx.x) < span.edges) assign(out[span.edge(threadIdx.x)], 0.f);
    uint4* vectors = reinterpret_cast<uint4*>(out + span.head);
    for (int v = threadIdx.x; v < span.vectors; v += blockDim.x) store_streaming(vectors + v, {0, 0, 0, 0});
}

}  // namespace fused_losses
