// The part of DLPack 1 that reads a tensor's pointer, type, shape and strides through the functions that its class
// offers as __dlpack_c_exchange_api__: https://dmlc.github.io/dlpack/latest/c_api.html. Layouts are that ABI's.
#pragma once

#include <stdint.h>

namespace fused_losses {
namespace dlpack {

constexpr uint32_t kMajor = 1;

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4 };

struct DataType {
    uint8_t code;
    uint8_t bits;
    uint16_t lanes;
};

struct Tensor {
    void* data;
    int32_t device_type;
    int32_t device_id;
    int32_t ndim;
    DataType dtype;
    int64_t* shape;
    int64_t* strides;  // elements
    uint64_t byte_offset;
};

struct ExchangeApi {
    uint32_t major, minor;
    ExchangeApi* previous;  // of a lower major version
    void* managed_tensor_allocator;
    void* managed_tensor_from_object;
    void* managed_tensor_to_object;
    // What `out` points to belongs to the object. Not 0: a Python exception is set.
    int (*tensor_from_object)(void* object, Tensor* out);
    void* current_work_stream;
};

constexpr char kCapsule[] = "dlpack_exchange_api";

}  // namespace dlpack
}  // namespace fused_losses
