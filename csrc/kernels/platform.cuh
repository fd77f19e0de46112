// The one place that knows whether nvcc or the host compiler reads a kernel.
//
// Kernels use CUDA's own spelling (threadIdx, __syncthreads, __shfl_xor_sync, ...) plus the names below. On the
// device these are PTX; on the host they are the SIMT emulator's twins (emu/emu.h), so the same text runs on a CPU.
// What a kernel keeps to so that this holds: dynamic shared memory through dyn_smem() only, launches through
// launch() and launch_together() only, PTX only here or inside cute/arch ops (matrix.cuh).
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>
#else
#include "emu/platform.h"  // CUDA's names on the host, and lsm::{dyn_smem, launch, load_global, ...}
#endif

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define LSM_DEVICE __device__ __forceinline__
#define LSM_UNROLL _Pragma("unroll")
#define LSM_UNROLL_BY(n) \
    LSM_UNROLL_PRAGMA_(unroll n)  // 1: rolled, where registers matter more than a few cycles
#define LSM_UNROLL_PRAGMA_(text) _Pragma(#text)

namespace lsm {

using u32 = uint32_t;
using i64 = int64_t;
using bf16 = __nv_bfloat16;
using half = __half;

#ifdef __CUDACC__

// The block's dynamic shared memory, 1024-byte aligned.
LSM_DEVICE char* dyn_smem() {
    extern __shared__ __align__(1024) char lsm_dynamic_shared_memory[];
    return lsm_dynamic_shared_memory;
}

LSM_DEVICE u32 smem_u32(void const* p) {
    return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Two floats to one 32-bit word of T2 (low half first).
LSM_DEVICE u32 pack(float low, float high, bf16*) {
    __nv_bfloat162 const r = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<u32 const&>(r);
}

LSM_DEVICE u32 pack(float low, float high, half*) {
    __half2 const r = __floats2half2_rn(low, high);
    return reinterpret_cast<u32 const&>(r);
}

// 2^x, flushing denormal results; at most 2 ulp.
LSM_DEVICE float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// One thread's access to global memory, 2 to 16 bytes, aligned to its size. A plain load or store here; on the
// emulator also counted, in bytes and in 32-byte sectors per warp, so that tests can hold a kernel to its roofline.
template <class T>
LSM_DEVICE T load_global(T const* p) {
    static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
    return *p;
}

template <class T>
LSM_DEVICE void store_global(T* p, std::type_identity_t<T> value) {
    static_assert(sizeof(T) <= 16 && (sizeof(T) & (sizeof(T) - 1)) == 0);
    *p = value;
}

// The same for shared memory: counted with its bank conflicts, and checked in every build.
template <class T>
LSM_DEVICE T load_shared(T const* p) {
    return *p;
}

template <class T>
LSM_DEVICE void store_shared(T* p, std::type_identity_t<T> value) {
    *p = value;
}

// 16 bytes global -> shared, past the registers; `valid == false` reads nothing and writes zeros.
LSM_DEVICE void cp_async16(u32 destination, void const* source, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

// The same of 4 bytes, for what lies apart.
LSM_DEVICE void cp_async4(u32 destination, void const* source, bool valid) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(destination), "l"(source),
                 "r"(valid ? 4 : 0)
                 : "memory");
}

LSM_DEVICE void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Blocks until at most `Pending` of this thread's groups are still in flight; none: nor any copy not yet in a group.
template <int Pending>
LSM_DEVICE void cp_async_wait() {
    if constexpr (Pending == 0) {
        asm volatile("cp.async.wait_all;" ::: "memory");
    } else {
        asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
    }
}

inline void check_launch(cudaError_t status) {
    if (status != cudaSuccess) {
        cudaGetLastError();  // not the next launch's error
        throw std::runtime_error(std::string("CUDA kernel launch failed: ") +
                                 cudaGetErrorString(status));
    }
}

inline void allow_shared_memory(void const* kernel, std::size_t bytes) {
    if (bytes <= 48 * 1024) return;
    cudaError_t const status = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes));
    if (status != cudaSuccess) {
        cudaGetLastError();
        throw std::runtime_error("this GPU has too little shared memory per block for " +
                                 std::to_string(bytes) + " bytes: " + cudaGetErrorString(status) +
                                 "; use smaller heads");
    }
}

template <class... P>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t smem_bytes, void* stream,
            P... params) {
    allow_shared_memory(reinterpret_cast<void const*>(kernel), smem_bytes);
    kernel<<<grid, block, smem_bytes, static_cast<cudaStream_t>(stream)>>>(params...);
    check_launch(cudaGetLastError());
}

// For blocks that wait for each other in both directions: none begins before all can run at once.
template <class... P>
void launch_together(void (*kernel)(P...), dim3 grid, dim3 block, std::size_t smem_bytes,
                     void* stream, P... params) {
    void const* const entry = reinterpret_cast<void const*>(kernel);
    allow_shared_memory(entry, smem_bytes);
    void* pointers[] = {&params...};
    check_launch(cudaLaunchCooperativeKernel(entry, grid, block, pointers, smem_bytes,
                                             static_cast<cudaStream_t>(stream)));
}

inline int multiprocessors() {
    int device = 0, count = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count;
}

// How many blocks that takes at most; 0 where the device cannot promise it.
template <class... P>
int blocks_together(void (*kernel)(P...), dim3 block, std::size_t smem_bytes) {
    void const* const entry = reinterpret_cast<void const*>(kernel);
    allow_shared_memory(entry, smem_bytes);
    int device = 0, can = 0, each = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&can, cudaDevAttrCooperativeLaunch, device);
    check_launch(cudaOccupancyMaxActiveBlocksPerMultiprocessor(
        &each, entry, static_cast<int>(block.x * block.y * block.z), smem_bytes));
    return can ? each * multiprocessors() : 0;
}

#endif  // __CUDACC__

// What lies at a shared-window offset. Kernels keep 32-bit offsets, because recomputing them from pointers costs
// registers in every inner loop; the way to a pointer and back inside CuTe's ops costs nothing.
template <class T>
LSM_DEVICE T& at_shared(u32 address) {
    return *static_cast<T*>(__cvta_shared_to_generic(address));
}

// What the results of a call with wrong boundaries are filled with.
LSM_DEVICE float nan_value() {
    return __int_as_float(0x7fffffff);
}

}  // namespace lsm
