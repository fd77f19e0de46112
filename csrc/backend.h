// Which device the operators of this library run on. One of the three macros is set by the build; the operators in
// ops/ are written once against the names below.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>

#include "checks.h"

#define LSM_STRING_(x) #x
#define LSM_STRING(x) LSM_STRING_(x)
#ifndef LSM_NAMESPACE
#define LSM_NAMESPACE lsm
#endif

#if defined(LSM_BACKEND_CUDA)
#define LSM_DISPATCH_KEY CUDA
#elif defined(LSM_BACKEND_CPU) || defined(LSM_BACKEND_EMULATOR)
#define LSM_DISPATCH_KEY CPU
#else
#error "define LSM_BACKEND_CPU, LSM_BACKEND_CUDA or LSM_BACKEND_EMULATOR"
#endif

namespace lsm {
namespace {

#if defined(LSM_BACKEND_CPU)
constexpr bool kTensorCores = false;  // any size, any alignment, fp64
#else
constexpr bool kTensorCores = true;  // sizes up to 256, 16-byte rows, no fp64
#endif

// Whether reading the values of a small tensor costs no synchronisation.
#if defined(LSM_BACKEND_CUDA)
constexpr bool kReadsValues = false;
#else
constexpr bool kReadsValues = true;
#endif

// Whether lists of blocks and tables of pages are checked before a kernel reads them. On a GPU that waits for the device,
// and is for debugging: LSM_CHECK_LISTS=1. With 0 kernels there, emulated ones too, leave out what does not exist.
inline bool checks_lists() {
    char const* const set = std::getenv("LSM_CHECK_LISTS");
    if (!kTensorCores || set == nullptr) return kReadsValues;
    return *set != '0';
}

// The tensor where its values can be read.
inline Tensor on_host(Tensor const& t) {
    if (kReadsValues) return t;
    return torch::stable::to(t, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// Makes the tensor's device current for the life of the object and tells its current stream.
class DeviceScope {
  public:
#if defined(LSM_BACKEND_CUDA)
    explicit DeviceScope(Tensor const& t) : guard_(t.get_device_index()) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream_));
    }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
#else
    explicit DeviceScope(Tensor const&) {}

  private:
#endif
    void* stream_ = nullptr;

  public:
    void* stream() const { return stream_; }
};

}  // namespace
}  // namespace lsm
