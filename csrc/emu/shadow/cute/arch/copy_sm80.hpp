// cp.async on the emulator.
#pragma once

#include "emu/emu.h"

#define SM80_CP_ASYNC_CACHEALWAYS cutlass_SM80_CP_ASYNC_CACHEALWAYS
#define SM80_CP_ASYNC_CACHEGLOBAL cutlass_SM80_CP_ASYNC_CACHEGLOBAL
#define SM80_CP_ASYNC_CACHEALWAYS_ZFILL cutlass_SM80_CP_ASYNC_CACHEALWAYS_ZFILL
#define SM80_CP_ASYNC_CACHEGLOBAL_ZFILL cutlass_SM80_CP_ASYNC_CACHEGLOBAL_ZFILL
#define cp_async_fence cutlass_cp_async_fence
#define cp_async_wait cutlass_cp_async_wait
#include_next <cute/arch/copy_sm80.hpp>
#undef SM80_CP_ASYNC_CACHEALWAYS
#undef SM80_CP_ASYNC_CACHEGLOBAL
#undef SM80_CP_ASYNC_CACHEALWAYS_ZFILL
#undef SM80_CP_ASYNC_CACHEGLOBAL_ZFILL
#undef cp_async_fence
#undef cp_async_wait

namespace lsm::emu {

template <class Source, class Destination>
struct CpAsync {
    using SRegisters = Source[1];
    using DRegisters = Destination[1];
    static_assert(sizeof(Source) == sizeof(Destination));
    static_assert(sizeof(Source) == 4 || sizeof(Source) == 8 || sizeof(Source) == 16);

    [[gnu::always_inline]] static inline void copy(Source const& source, Destination& destination) {
        cp_async(shared_offset(&destination), &source, sizeof(Source), sizeof(Source));
    }
};

template <class Source, class Destination>
struct CpAsyncZeroFill : CpAsync<Source, Destination> {
    [[gnu::always_inline]] static inline void copy(Source const& source, Destination& destination,
                                                   bool valid) {
        cp_async(shared_offset(&destination), &source, sizeof(Source), valid ? sizeof(Source) : 0);
    }
};

}  // namespace lsm::emu

namespace cute {

template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEALWAYS : lsm::emu::CpAsync<TS, TD> {};
template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEGLOBAL : lsm::emu::CpAsync<TS, TD> {};
template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEALWAYS_ZFILL : lsm::emu::CpAsyncZeroFill<TS, TD> {};
template <class TS, class TD = TS>
struct SM80_CP_ASYNC_CACHEGLOBAL_ZFILL : lsm::emu::CpAsyncZeroFill<TS, TD> {};

[[gnu::always_inline]] inline void cp_async_fence() {
    lsm::emu::cp_async_commit();
}

template <int N>
[[gnu::always_inline]] inline void cp_async_wait() {
    if constexpr (N == 0) {
        lsm::emu::cp_async_wait_all();
    } else {
        lsm::emu::cp_async_wait(N);
    }
}

template <int N>
[[gnu::always_inline]] inline void cp_async_wait(Int<N>) {
    cp_async_wait<N>();
}

}  // namespace cute
