// TMA loads, stores, reductions and bulk copies on the emulator. Multicast and im2col are not
// emulated.
#pragma once

#include "emu/emu.h"

#define SM90_TMA_LOAD_1D cutlass_SM90_TMA_LOAD_1D
#define SM90_TMA_LOAD_2D cutlass_SM90_TMA_LOAD_2D
#define SM90_TMA_LOAD_3D cutlass_SM90_TMA_LOAD_3D
#define SM90_TMA_LOAD_4D cutlass_SM90_TMA_LOAD_4D
#define SM90_TMA_LOAD_5D cutlass_SM90_TMA_LOAD_5D
#define SM90_TMA_LOAD cutlass_SM90_TMA_LOAD
#define SM90_TMA_STORE_1D cutlass_SM90_TMA_STORE_1D
#define SM90_TMA_STORE_2D cutlass_SM90_TMA_STORE_2D
#define SM90_TMA_STORE_3D cutlass_SM90_TMA_STORE_3D
#define SM90_TMA_STORE_4D cutlass_SM90_TMA_STORE_4D
#define SM90_TMA_STORE_5D cutlass_SM90_TMA_STORE_5D
#define SM90_TMA_STORE cutlass_SM90_TMA_STORE
#define SM90_TMA_REDUCE_ADD_1D cutlass_SM90_TMA_REDUCE_ADD_1D
#define SM90_TMA_REDUCE_ADD_2D cutlass_SM90_TMA_REDUCE_ADD_2D
#define SM90_TMA_REDUCE_ADD_3D cutlass_SM90_TMA_REDUCE_ADD_3D
#define SM90_TMA_REDUCE_ADD_4D cutlass_SM90_TMA_REDUCE_ADD_4D
#define SM90_TMA_REDUCE_ADD_5D cutlass_SM90_TMA_REDUCE_ADD_5D
#define SM90_TMA_REDUCE_ADD cutlass_SM90_TMA_REDUCE_ADD
#define SM90_BULK_COPY_G2S cutlass_SM90_BULK_COPY_G2S
#define SM90_BULK_COPY_S2G cutlass_SM90_BULK_COPY_S2G
#define tma_store_fence cutlass_tma_store_fence
#define tma_store_arrive cutlass_tma_store_arrive
#define tma_store_wait cutlass_tma_store_wait
#include_next <cute/arch/copy_sm90_tma.hpp>
#undef SM90_TMA_LOAD_1D
#undef SM90_TMA_LOAD_2D
#undef SM90_TMA_LOAD_3D
#undef SM90_TMA_LOAD_4D
#undef SM90_TMA_LOAD_5D
#undef SM90_TMA_LOAD
#undef SM90_TMA_STORE_1D
#undef SM90_TMA_STORE_2D
#undef SM90_TMA_STORE_3D
#undef SM90_TMA_STORE_4D
#undef SM90_TMA_STORE_5D
#undef SM90_TMA_STORE
#undef SM90_TMA_REDUCE_ADD_1D
#undef SM90_TMA_REDUCE_ADD_2D
#undef SM90_TMA_REDUCE_ADD_3D
#undef SM90_TMA_REDUCE_ADD_4D
#undef SM90_TMA_REDUCE_ADD_5D
#undef SM90_TMA_REDUCE_ADD
#undef SM90_BULK_COPY_G2S
#undef SM90_BULK_COPY_S2G
#undef tma_store_fence
#undef tma_store_arrive
#undef tma_store_wait

namespace lsm::emu {

// CuTe's traits are specialised by the type of each op's own PREFETCH.
struct TmaPrefetch {
    template <class... C>
    static void copy(void const*, C const&...) {}
};

struct TmaLoad {
    template <class... C>
    [[gnu::always_inline]] static inline void copy(void const* map, u64* barrier, u64,
                                                   void* destination, C const&... coordinate) {
        int const c[] = {static_cast<int>(coordinate)...};
        tma_load(map, shared_offset(barrier), shared_offset(destination), sizeof...(C), c);
    }
};

template <bool Add>
struct TmaStore {
    template <class... C>
    [[gnu::always_inline]] static inline void copy(void const* map, void const* source,
                                                   C const&... coordinate) {
        int const c[] = {static_cast<int>(coordinate)...};
        tma_store(map, shared_offset(source), sizeof...(C), c, Add);
    }
};

}  // namespace lsm::emu

namespace cute {

struct SM90_TMA_LOAD_1D : lsm::emu::TmaLoad {
    struct PREFETCH : lsm::emu::TmaPrefetch {};
};
struct SM90_TMA_LOAD_2D : lsm::emu::TmaLoad {
    struct PREFETCH : lsm::emu::TmaPrefetch {};
};
struct SM90_TMA_LOAD_3D : lsm::emu::TmaLoad {
    struct PREFETCH : lsm::emu::TmaPrefetch {};
};
struct SM90_TMA_LOAD_4D : lsm::emu::TmaLoad {
    struct PREFETCH : lsm::emu::TmaPrefetch {};
};
struct SM90_TMA_LOAD_5D : lsm::emu::TmaLoad {
    struct PREFETCH : lsm::emu::TmaPrefetch {};
};
struct SM90_TMA_LOAD : lsm::emu::TmaLoad {
    struct PREFETCH : lsm::emu::TmaPrefetch {};
};

struct SM90_TMA_STORE_1D : lsm::emu::TmaStore<false> {};
struct SM90_TMA_STORE_2D : lsm::emu::TmaStore<false> {};
struct SM90_TMA_STORE_3D : lsm::emu::TmaStore<false> {};
struct SM90_TMA_STORE_4D : lsm::emu::TmaStore<false> {};
struct SM90_TMA_STORE_5D : lsm::emu::TmaStore<false> {};
struct SM90_TMA_STORE : lsm::emu::TmaStore<false> {};

struct SM90_TMA_REDUCE_ADD_1D : lsm::emu::TmaStore<true> {};
struct SM90_TMA_REDUCE_ADD_2D : lsm::emu::TmaStore<true> {};
struct SM90_TMA_REDUCE_ADD_3D : lsm::emu::TmaStore<true> {};
struct SM90_TMA_REDUCE_ADD_4D : lsm::emu::TmaStore<true> {};
struct SM90_TMA_REDUCE_ADD_5D : lsm::emu::TmaStore<true> {};
struct SM90_TMA_REDUCE_ADD : lsm::emu::TmaStore<true> {};

struct SM90_BULK_COPY_G2S {
    [[gnu::always_inline]] static inline void copy(void const* source, uint64_t* barrier,
                                                   void* destination, int32_t bytes) {
        lsm::emu::bulk_load(source, lsm::emu::shared_offset(barrier),
                            lsm::emu::shared_offset(destination), static_cast<uint32_t>(bytes));
    }
    struct PREFETCH : lsm::emu::TmaPrefetch {};
};

struct SM90_BULK_COPY_S2G {
    [[gnu::always_inline]] static inline void copy(void const* source, void* destination,
                                                   int32_t bytes) {
        lsm::emu::bulk_store(destination, lsm::emu::shared_offset(source),
                             static_cast<uint32_t>(bytes));
    }
};

[[gnu::always_inline]] inline void tma_store_fence() {
    lsm::emu::fence_proxy_async();
}
[[gnu::always_inline]] inline void tma_store_arrive() {
    lsm::emu::bulk_commit();
}

template <int Count>
[[gnu::always_inline]] inline void tma_store_wait() {
    lsm::emu::bulk_wait(Count);
}

}  // namespace cute
