// The CUDA runtime, as far as csrc/cuda calls it: devices as they are described to it, errors when they are wanted, and a
// launch that runs the kernel at once. Strict where a GPU would fail, or be slower than meant.
#pragma once

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "host_cuda.h"

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidDeviceFunction = 98,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNoKernelImageForDevice = 209,
};
enum cudaDeviceAttr {
    cudaDevAttrMultiProcessorCount,
    cudaDevAttrL2CacheSize,
    cudaDevAttrComputeCapabilityMajor,
    cudaDevAttrComputeCapabilityMinor,
    cudaDevAttrMaxSharedMemoryPerBlockOptin,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
struct cudaFuncAttributes {
    int ptxVersion;
};
using cudaStream_t = struct Stream*;

struct dim3 {
    unsigned x, y = 1, z = 1;
    explicit dim3(unsigned x = 1) : x(x) {}
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        struct {
            unsigned x, y, z;
        } clusterDim;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};

namespace host_cuda {

struct Device {
    int multiprocessors = 2, l2_bytes = 1 << 20, major = 8, minor = 0, of_block = 48 << 10, of_multiprocessor = 64 << 10;
};

struct Launch {
    int device, blocks, threads, shared_bytes, together;
    const void* kernel;
    cudaStream_t stream;
};

// What all of the runtime knows. Errors: by the name of the call that is to fail.
struct Runtime {
    std::vector<Device> devices{Device{}};
    int current = 0, driver = 13000, version = 13000;
    int code = 0;  // the architecture that the kernels were compiled for; 0: the device's
    std::map<std::string, cudaError_t> errors;
    std::map<std::string, int> calls;
    std::map<std::pair<int, const void*>, int> allowed;  // shared memory, by device and kernel
    std::vector<Launch> launches;
    cudaError_t last = cudaSuccess;
    bool runs = true;  // what is launched

    cudaError_t call(const std::string& name) {
        ++calls[name];
        const auto error = errors.find(name);
        return last = error == errors.end() ? cudaSuccess : error->second;
    }
    cudaError_t fail(cudaError_t error) { return last = error; }
};

extern Runtime runtime;

}  // namespace host_cuda

inline const char* cudaGetErrorName(cudaError_t error) {
    return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorOfSomeKind";
}
inline const char* cudaGetErrorString(cudaError_t) { return "as the test asked for"; }
inline cudaError_t cudaGetLastError() { return std::exchange(host_cuda::runtime.last, cudaSuccess); }
inline cudaError_t cudaDriverGetVersion(int* out) {
    *out = host_cuda::runtime.driver;
    return host_cuda::runtime.call("cudaDriverGetVersion");
}
inline cudaError_t cudaRuntimeGetVersion(int* out) {
    *out = host_cuda::runtime.version;
    return host_cuda::runtime.call("cudaRuntimeGetVersion");
}
inline cudaError_t cudaGetDeviceCount(int* out) {
    *out = static_cast<int>(host_cuda::runtime.devices.size());
    return host_cuda::runtime.call("cudaGetDeviceCount");
}
inline cudaError_t cudaGetDevice(int* out) {
    *out = host_cuda::runtime.current;
    return host_cuda::runtime.call("cudaGetDevice");
}
inline cudaError_t cudaSetDevice(int device) {
    if (const cudaError_t error = host_cuda::runtime.call("cudaSetDevice")) return error;
    host_cuda::runtime.current = device;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* out, cudaDeviceAttr what, int index) {
    if (const cudaError_t error = host_cuda::runtime.call("cudaDeviceGetAttribute")) return error;
    if (index < 0 || index >= static_cast<int>(host_cuda::runtime.devices.size()))
        return host_cuda::runtime.fail(cudaErrorInvalidDevice);
    const host_cuda::Device& device = host_cuda::runtime.devices[index];
    const int of[] = {device.multiprocessors, device.l2_bytes, device.major,
                      device.minor,           device.of_block, device.of_multiprocessor};
    *out = of[what];
    return cudaSuccess;
}
inline cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* out, void (*)()) {
    const host_cuda::Device& device = host_cuda::runtime.devices[host_cuda::runtime.current];
    out->ptxVersion = host_cuda::runtime.code ? host_cuda::runtime.code : 10 * device.major + device.minor;
    return host_cuda::runtime.call("cudaFuncGetAttributes");
}

template <class Params>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Params), cudaFuncAttribute, int value) {
    using host_cuda::runtime;
    if (const cudaError_t error = runtime.call("cudaFuncSetAttribute")) return error;
    if (value < 0 || value > runtime.devices[runtime.current].of_block) return runtime.fail(cudaErrorInvalidValue);
    runtime.allowed[{runtime.current, reinterpret_cast<const void*>(kernel)}] = value;
    return cudaSuccess;
}

template <class Params>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* asked, void (*kernel)(Params), const Params& params) {
    using namespace host_cuda;
    if (const cudaError_t error = runtime.call("cudaLaunchKernelEx")) return error;
    const cudaLaunchConfig_t& config = *asked;
    const void* const id = reinterpret_cast<const void*>(kernel);
    const auto allowed = runtime.allowed.find({runtime.current, id});
    const size_t most = allowed == runtime.allowed.end() ? 48 << 10 : std::max(allowed->second, 48 << 10);
    const unsigned blocks = config.gridDim.x, threads = config.blockDim.x;
    const unsigned together = config.numAttrs ? config.attrs->val.clusterDim.x : 1;
    const bool fits = blocks >= 1 && blocks <= 0x7fffffff && threads >= 1 && threads <= 1024;
    if (!fits || config.dynamicSmemBytes > most) return runtime.fail(cudaErrorInvalidValue);
    if (together > 1 && (runtime.devices[runtime.current].major < 9 || blocks % together || together > 8))
        return runtime.fail(cudaErrorInvalidValue);
    if (threads % kWarp) fail("a block of " + std::to_string(threads) + " threads");
    runtime.launches.push_back({runtime.current, static_cast<int>(blocks), static_cast<int>(threads),
                                static_cast<int>(config.dynamicSmemBytes), static_cast<int>(together), id,
                                config.stream});
    if (!runtime.runs) return cudaSuccess;
    block.blocks.x = blocks;
    block.threads.x = threads;
    block.shared_bytes = config.dynamicSmemBytes;
    ++block.launch;
    for (unsigned i = 0; i < blocks; i += together)
        block.run(kernel, params, descending ? blocks - together - i : i, together);
    return cudaSuccess;
}
