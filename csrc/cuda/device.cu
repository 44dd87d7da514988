#include <atomic>
#include <stdexcept>

#include "device.h"
#include "runtime.h"

namespace fused_losses {
namespace {

// Compiled for the same architectures as the real kernels: if this one has an image for a device, they have.
__global__ void probe() {}

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); }

// No image for the device, or nothing works there. Else its limits are known from here on.
std::string not_ready(int index, int capability) {
    int previous = 0;
    cudaError_t error = cudaGetDevice(&previous);
    // Only where it is another one: making a device current takes hundreds of megabytes of its memory.
    if (error == cudaSuccess && index != previous) error = cudaSetDevice(index);
    if (error != cudaSuccess) return "CUDA device " + std::to_string(index) + " can't be used: " + why(error);
    cudaFuncAttributes attributes;
    error = cudaFuncGetAttributes(&attributes, probe);
    if (error == cudaSuccess) device_limits();
    if (index != previous) cudaSetDevice(previous);
    if (error == cudaSuccess) return "";
    if (error != cudaErrorNoKernelImageForDevice && error != cudaErrorInvalidDeviceFunction)
        return "CUDA device " + std::to_string(index) + " can't be used: " + why(error);
    cudaGetLastError();
    return "the CUDA kernels were built for architectures " FL_CUDA_ARCHITECTURES " and device " +
           std::to_string(index) + " is sm_" + std::to_string(capability) +
           "; rebuild with that architecture in the list";
}

}  // namespace

std::string cuda_version() {
    int runtime = 0;
    cudaRuntimeGetVersion(&runtime);  // the one that is linked in
    return version(runtime);
}

std::string unusable(int index) {
    int driver = 0, runtime = 0, count = 0, major = 0, minor = 0;
    // With no driver at all the runtime reports version 0 and every other call says "driver insufficient".
    if (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0) {
        cudaGetLastError();
        return "there is no NVIDIA driver on this machine; install one, or use CPU tensors";
    }
    if (cudaRuntimeGetVersion(&runtime) == cudaSuccess && driver / 1000 < runtime / 1000)
        return "the NVIDIA driver supports CUDA " + version(driver) + " and these kernels were built with CUDA " +
               version(runtime) + "; update the driver, or reinstall with CUDA_HOME naming a CUDA " +
               std::to_string(driver / 1000) + " with nvcc";
    cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess && error != cudaErrorNoDevice)
        return "the CUDA devices can't be listed (" + why(error) + ")";
    if (error == cudaErrorNoDevice) cudaGetLastError();
    if (index < 0 || index >= count)
        return "there is no CUDA device " + std::to_string(index) + ", this process sees " + std::to_string(count) +
               "; check CUDA_VISIBLE_DEVICES";
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    if (error != cudaSuccess) return "CUDA device " + std::to_string(index) + " can't be asked (" + why(error) + ")";
    const int capability = major * 10 + minor;
    if (capability < 80)
        return "CUDA device " + std::to_string(index) + " is sm_" + std::to_string(capability) +
               " and these kernels need sm_80 (A100) or newer; use backend=\"triton\" or \"eager\"";
    return not_ready(index, capability);
}

DeviceLimits device_limits() {
    constexpr int kDevices = 64;
    static std::atomic<const DeviceLimits*> kept[kDevices];
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    const bool keep = error == cudaSuccess && device < kDevices;
    if (keep)
        if (const DeviceLimits* limits = kept[device].load(std::memory_order_acquire)) return *limits;
    int multiprocessors = 0, l2_bytes = 0, of_block = 0, of_multiprocessor = 0, major = 0;
    const auto ask = [&](int& out, cudaDeviceAttr what) {
        if (error == cudaSuccess) error = cudaDeviceGetAttribute(&out, what, device);
    };
    ask(multiprocessors, cudaDevAttrMultiProcessorCount);
    ask(l2_bytes, cudaDevAttrL2CacheSize);
    ask(of_block, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    ask(of_multiprocessor, cudaDevAttrMaxSharedMemoryPerMultiprocessor);
    ask(major, cudaDevAttrComputeCapabilityMajor);
    cudaFuncAttributes code{};
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&code, probe);
    if (error != cudaSuccess) throw std::runtime_error("fused_losses: no usable CUDA device (" + why(error) + ")");
    if (!allow_shared(of_block).empty()) of_block = 0;
    // Code for an older architecture, which a device has compiled for itself, has no barrier of a cluster.
    const bool clusters = major >= 9 && code.ptxVersion >= 90;
    const DeviceLimits limits{multiprocessors, l2_bytes, of_block, of_multiprocessor, clusters};
    if (keep) kept[device].store(new DeviceLimits(limits), std::memory_order_release);  // for as long as the process
    return limits;
}

}  // namespace fused_losses
