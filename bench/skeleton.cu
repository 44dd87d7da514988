// The data path of csrc/cuda/on_chip.cuh without the loss, and copies written by hand: which instructions and cache
// hints get how near to a copy, and what the end of a row costs. skeleton.py compiles and times it. Rows are bfloat16,
// whole vectors.
#include <cuda_runtime.h>
#include <stdint.h>

constexpr int kSlots = 4, kWarp = 32, kGroups = 14;

struct Asked {
    const uint4* in;
    uint4* out;
    float* sums;
    int n, vectors;                 // rows, and what each has
    int threads, grid, chunks;      // of a block, of which each holds kSlots * threads vectors on chip
    int shared_bytes;               // for them
    int delay;                      // clocks at the end of each row
    int announced, rest_announced;  // vectors of the next row, and of its rest, that are brought to L2 ahead
    int shift;                      // vectors by which slots lie off a multiple of 128 bytes
};

enum Loads { kCopies, kCopiesThroughL1, kBulkLoads };
enum Stores { kPlain, kStreaming, kBulkStores };

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
template <int kLoads>
__device__ __forceinline__ void copy_async(uint4* to, const uint4* from) {
    if (kLoads == kCopies)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
}
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
__device__ __forceinline__ void wait_for(uint64_t* barrier, int parity) {
    asm volatile("{\n.reg .pred p;\nAGAIN:\nmbarrier.try_wait.parity.shared.b64 p, [%0], %1;\n@!p bra AGAIN;\n}" ::"r"(
                     shared_address(barrier)),
                 "r"(parity)
                 : "memory");
}
__device__ __forceinline__ void prefetch(const void* from, int bytes) {
    if (threadIdx.x == 0 && bytes > 0)
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes));
}
__device__ __forceinline__ void pair_barrier() {
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
template <bool kKept>
__device__ __forceinline__ uint4 load_rest(const uint4* p) {
    if (!kKept) return *p;
    uint64_t last;
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(last));
    uint4 v;
    asm volatile("ld.global.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p), "l"(last));
    return v;
}
template <int kStores>
__device__ __forceinline__ void store(uint4* p, const uint4& v) {
    if (kStores == kPlain)
        *p = v;
    else
        __stcs(p, v);
}

__device__ __forceinline__ float ex2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
template <bool kMath>
__device__ __forceinline__ void add(const uint4& v, float& sum) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (uint32_t w : words) {
        const float a = __uint_as_float(w << 16), b = __uint_as_float(w & 0xffff0000u);
        sum = kMath ? sum + ex2(fmaf(a, 1.44f, -3.f)) + ex2(fmaf(b, 1.44f, -3.f)) : fmaxf(sum, fmaxf(a, b));
    }
}
template <bool kMath>
__device__ __forceinline__ uint4 mapped(const uint4& v, float factor) {
    uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (uint32_t& w : words) {
        float a = __uint_as_float(w << 16), b = __uint_as_float(w & 0xffff0000u);
        a = kMath ? factor * ex2(fmaf(a, 1.44f, -3.f)) : a + factor;
        b = kMath ? factor * ex2(fmaf(b, 1.44f, -3.f)) : b + factor;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w) : "f"(b), "f"(a));
    }
    return {words[0], words[1], words[2], words[3]};
}
__device__ __forceinline__ float warp_sum(float x) {
    for (int lane = kWarp / 2; lane > 0; lane /= 2) x += __shfl_xor_sync(~0u, x, lane);
    return x;
}

// As the engine, a warp's share of a chunk is kSlots * 32 neighbouring vectors. kPair: two blocks of a cluster have a
// half of each row.
template <int kLoads, int kStores, bool kMath, bool kKept, bool kPair>
__global__ void __launch_bounds__(768, 1) skeleton(const Asked p) {
    extern __shared__ __align__(128) uint4 memory[];
    __shared__ float partials[2][2 * kWarp];
    __shared__ uint64_t barriers[24 * 8];  // of bulk loads: at most 8 chunks of 24 warps
    const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp, warps = blockDim.x / kWarp;
    const int step = kSlots * blockDim.x, first = warp * kSlots * kWarp;
    const int rank = kPair ? blockIdx.x & 1 : 0, block = kPair ? blockIdx.x >> 1 : blockIdx.x;
    const int grid = kPair ? gridDim.x >> 1 : gridDim.x, vectors = kPair ? p.vectors / 2 : p.vectors;
    uint4* const slots = memory + p.shift + first;
    uint64_t* const barrier = barriers + warp * 8;
    if (kLoads == kBulkLoads) {
        if (lane < 8)
            asm volatile("mbarrier.init.shared.b64 [%0], 1;" ::"r"(shared_address(barrier + lane)) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        __syncthreads();
    }
    if (kPair) pair_barrier();  // both have begun
    const auto share = [&](int c) { return min(max(vectors - c * step - first, 0), kSlots * kWarp); };
    const auto row_of = [&](int64_t i) { return i < p.n ? p.in + i * p.vectors + rank * vectors : nullptr; };
    const auto fetch = [&](const uint4* row, int c) {
        const int have = row ? share(c) : 0;
        if (kLoads != kBulkLoads) {
#pragma unroll
            for (int u = 0; u < kSlots; ++u) {
                const int v = lane + u * kWarp;
                if (v < have) copy_async<kLoads>(slots + c * step + v, row + c * step + first + v);
            }
            return commit();
        }
        if (lane != 0 || have == 0) return;
        asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier + c)),
                     "r"(16 * have)
                     : "memory");
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(slots + c * step)),
                     "l"(row + c * step + first), "r"(16 * have), "r"(shared_address(barrier + c))
                     : "memory");
    };
    const auto close_groups = [&] {
        if (kLoads != kBulkLoads)
            for (int c = p.chunks; c < kGroups; ++c) commit();
    };
    for (int c = 0; c < p.chunks; ++c) fetch(row_of(block), c);
    close_groups();
    const int some = (vectors - first - 1 + step) / step;
    int parity = 0, turn = 0;
    for (int64_t i = block; i < p.n; i += grid, parity ^= 1, turn ^= 1) {
        const uint4 *const row = row_of(i), *const next = row_of(i + grid);
        uint4* const out = p.out + i * p.vectors + rank * vectors + first;
        float sum = 0.f;
        for (int c = 0; c < some; ++c) {
            const int have = share(c);
            uint4 raw[kSlots];
            if (c < p.chunks) {
                if (kLoads != kBulkLoads)
                    asm volatile("cp.async.wait_group %0;" ::"n"(kGroups - 1) : "memory");
                else if (have > 0)
                    wait_for(barrier + c, parity);
            }
#pragma unroll
            for (int u = 0; u < kSlots; ++u) {
                const int v = lane + u * kWarp;
                raw[u] = v >= have      ? uint4{}
                         : c < p.chunks ? slots[c * step + v]
                                        : load_rest<kKept>(row + c * step + first + v);
            }
#pragma unroll
            for (const uint4& v : raw) add<kMath>(v, sum);
            if (kLoads != kBulkLoads && c < p.chunks) commit();
        }
        for (int c = max(some, 0); c < p.chunks; ++c)
            if (kLoads != kBulkLoads) commit();
        sum = warp_sum(sum);
        if (lane == 0) partials[turn][rank * warps + warp] = sum;
        if (kPair) {
            uint64_t theirs;
            asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(&partials[turn][rank * warps + warp]), "r"(1 - rank));
            if (lane == 0) *reinterpret_cast<float*>(theirs) = sum;
            pair_barrier();
        } else {
            __syncthreads();
        }
        sum = warp_sum(lane < (kPair ? 2 : 1) * warps ? partials[turn][lane] : 0.f);
        if (next) prefetch(next, 16 * min(p.announced, vectors));
        if (p.delay > 0)
            for (const long long start = clock64(); clock64() - start < p.delay;) {
            }
        const float factor = 1e-6f * sum;
        if (thread == 0) p.sums[i] = sum;
        for (int c = some - 1; c >= p.chunks; --c) {
            const int have = share(c);
            uint4 raw[kSlots];
#pragma unroll
            for (int u = 0; u < kSlots; ++u)
                raw[u] = lane + u * kWarp < have ? __ldcs(row + c * step + first + lane + u * kWarp) : uint4{};
#pragma unroll
            for (int u = 0; u < kSlots; ++u) {
                const int v = lane + u * kWarp;
                if (v < have) store<kStores>(out + c * step + v, mapped<kMath>(raw[u], factor));
            }
        }
        if (next) prefetch(next + p.chunks * step, 16 * min(p.rest_announced, vectors - p.chunks * step));
        for (int c = 0; c < p.chunks; ++c) {
            const int have = share(c);
            uint4 raw[kSlots];
#pragma unroll
            for (int u = 0; u < kSlots; ++u)
                raw[u] = lane + u * kWarp < have ? slots[c * step + lane + u * kWarp] : uint4{};
#pragma unroll
            for (int u = 0; u < kSlots; ++u) {
                const int v = lane + u * kWarp;
                if (v >= have) continue;
                if (kStores == kBulkStores)
                    slots[c * step + v] = mapped<kMath>(raw[u], factor);
                else
                    store<kStores>(out + c * step + v, mapped<kMath>(raw[u], factor));
            }
            if (kStores != kBulkStores) {
                __syncwarp();
                fetch(next, c);
                continue;
            }
            asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
            __syncwarp();
            if (lane == 0) {
                if (have > 0)
                    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(out + c * step),
                                 "r"(shared_address(slots + c * step)), "r"(16 * have)
                                 : "memory");
                asm volatile("cp.async.bulk.commit_group;\ncp.async.bulk.wait_group.read 1;" ::: "memory");
            }
            __syncwarp();
            if (c > 0) fetch(next, c - 1);
        }
        if (kStores == kBulkStores) {
            if (lane == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
            __syncwarp();
            fetch(next, p.chunks - 1);
        }
        close_groups();
    }
    if (kStores == kBulkStores && lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// A copy, or with no `in` zeros: kUnroll vectors of a thread at a time.
template <int kUnroll>
__global__ void plain_copy(const uint4* in, uint4* out, int64_t vectors) {
    const int64_t step = blockDim.x;
    for (int64_t i = blockIdx.x * step * kUnroll + threadIdx.x; i < vectors; i += gridDim.x * step * kUnroll) {
        uint4 raw[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) raw[u] = in && i + u * step < vectors ? in[i + u * step] : uint4{};
#pragma unroll
        for (int u = 0; u < kUnroll; ++u)
            if (i + u * step < vectors) out[i + u * step] = raw[u];
    }
}

template <int kLoads, int kStores, bool kMath, bool kKept, bool kPair>
int start(const Asked& p, cudaStream_t stream) {
    auto* const kernel = skeleton<kLoads, kStores, kMath, kKept, kPair>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, p.shared_bytes);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = 2;
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(p.grid);
    config.blockDim = dim3(p.threads);
    config.dynamicSmemBytes = p.shared_bytes;
    config.stream = stream;
    config.attrs = &cluster;
    config.numAttrs = kPair ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, p);
}

template <int kLoads, int kStores, bool kPair>
int start_with(const Asked& p, bool math, bool kept, cudaStream_t stream) {
    if (math && kept) return start<kLoads, kStores, true, true, kPair>(p, stream);
    if (math) return start<kLoads, kStores, true, false, kPair>(p, stream);
    return start<kLoads, kStores, false, false, kPair>(p, stream);
}

// A CUDA error, or 0.
extern "C" int run_skeleton(const Asked* p, int loads, int stores, int math, int kept, int pair, void* stream) {
    const auto s = static_cast<cudaStream_t>(stream);
    if (pair && stores == kStreaming) return start_with<kCopies, kStreaming, true>(*p, math, kept, s);
    if (pair) return start_with<kCopies, kPlain, true>(*p, math, kept, s);
    if (loads == kBulkLoads && stores == kBulkStores)
        return start_with<kBulkLoads, kBulkStores, false>(*p, math, kept, s);
    if (loads == kBulkLoads) return start_with<kBulkLoads, kStreaming, false>(*p, math, kept, s);
    if (loads == kCopiesThroughL1) return start_with<kCopiesThroughL1, kStreaming, false>(*p, math, kept, s);
    if (stores == kBulkStores) return start_with<kCopies, kBulkStores, false>(*p, math, kept, s);
    if (stores == kStreaming) return start_with<kCopies, kStreaming, false>(*p, math, kept, s);
    return start_with<kCopies, kPlain, false>(*p, math, kept, s);
}
extern "C" int size_of_asked() { return sizeof(Asked); }
extern "C" int run_copy(const void* in, void* out, int64_t vectors, int unroll, int threads, int grid, void* stream) {
    const auto* from = static_cast<const uint4*>(in);
    auto* const to = static_cast<uint4*>(out);
    const auto s = static_cast<cudaStream_t>(stream);
    const int64_t all = (vectors + threads * unroll - 1) / (threads * unroll);
    const int blocks = static_cast<int>(grid ? grid : all);
    if (unroll == 1) plain_copy<1><<<blocks, threads, 0, s>>>(from, to, vectors);
    if (unroll == 4) plain_copy<4><<<blocks, threads, 0, s>>>(from, to, vectors);
    if (unroll == 8) plain_copy<8><<<blocks, threads, 0, s>>>(from, to, vectors);
    return cudaGetLastError();
}
