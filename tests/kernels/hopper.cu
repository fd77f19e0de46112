// TMA, mbarriers, named barriers, setmaxnreg: through CuTe's own layouts and tensor maps.
#include "emu/cache.h"
#include "harness.h"

#include <cute/tensor.hpp>

#include <cutlass/arch/barrier.h>
#include <cutlass/arch/reg_reconfig.h>
#include <cute/arch/cluster_sm90.hpp>
#include <cute/atom/copy_traits_sm90_tma.hpp>
#include <cute/atom/mma_traits_sm90_gmma.hpp>

namespace lsm::test {
namespace {

using namespace cute;

template <int kRows, int kColumns, class Layout, class Tma>
__global__ void load_box(__grid_constant__ Tma const tma, float* y, int rows, int columns,
                         bool wait) {
    auto* const barrier =
        reinterpret_cast<uint64_t*>(dyn_smem() + sizeof(float) * cosize_v<Layout>);
    Tensor sX = make_tensor(make_smem_ptr(reinterpret_cast<float*>(dyn_smem())), Layout{});
    if (threadIdx.x == 0) {
        initialize_barrier(*barrier, 1);
        cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    Tensor gX = local_tile(tma.get_tma_tensor(make_shape(rows, columns)),
                           Shape<Int<kRows>, Int<kColumns>>{}, make_coord(blockIdx.x, blockIdx.y));
    auto thread = tma.get_slice(Int<0>{});
    if (threadIdx.x == 0) {
        set_barrier_transaction_bytes(*barrier, sizeof(float) * kRows * kColumns);
        copy(tma.with(*barrier), thread.partition_S(gX), thread.partition_D(sX));
    }
    if (wait) wait_barrier(*barrier, 0);
    for (int i = static_cast<int>(threadIdx.x); i < kRows * kColumns;
         i += static_cast<int>(blockDim.x)) {
        y[(blockIdx.y * gridDim.x + blockIdx.x) * kRows * kColumns + i] =
            sX(i / kColumns, i % kColumns);
    }
    if (!wait) wait_barrier(*barrier, 0);
}

template <class Atom, int kRows, int kColumns>
bool run_load_box(bool wait = true) {
    int const rows = kRows + 5,
              columns = kColumns + 4;  // ragged: the rest of the second boxes is zeros
    using Layout = decltype(tile_to_shape(Atom{}, Shape<Int<kRows>, Int<kColumns>>{}));
    std::vector<float4> memory(static_cast<std::size_t>(rows * columns / 4 + 4));
    auto* const x = reinterpret_cast<float*>(memory.data());
    for (int i = 0; i < rows * columns; ++i) x[i] = static_cast<float>(i + 1);
    std::vector<float> y(4 * kRows * kColumns);
    auto tma = make_tma_copy(
        SM90_TMA_LOAD{},
        make_tensor(make_gmem_ptr(static_cast<float const*>(x)),
                    make_layout(make_shape(rows, columns), make_stride(columns, Int<1>{}))),
        Layout{});
    launch(load_box<kRows, kColumns, Layout, decltype(tma)>, dim3(2, 2), dim3(64),
           sizeof(float) * cosize_v<Layout> + 16, nullptr, tma, y.data(), rows, columns, wait);
    for (int block = 0; block < 4; ++block) {
        for (int r = 0; r < kRows; ++r) {
            for (int c = 0; c < kColumns; ++c) {
                int const row = block % 2 * kRows + r, column = block / 2 * kColumns + c;
                float const expected =
                    row < rows && column < columns ? x[row * columns + column] : 0.0f;
                if (y[static_cast<std::size_t>((block * kRows + r) * kColumns + c)] != expected)
                    return false;
            }
        }
    }
    return true;
}
Case const tma_128("tma/load_128_byte_swizzle", [] {
    expect_silence([] { return run_load_box<GMMA::Layout_K_SW128_Atom<float>, 16, 32>(); });
});
Case const tma_64("tma/load_64_byte_swizzle", [] {
    expect_silence([] { return run_load_box<GMMA::Layout_K_SW64_Atom<float>, 16, 16>(); });
});
Case const tma_32("tma/load_32_byte_swizzle", [] {
    expect_silence([] { return run_load_box<GMMA::Layout_K_SW32_Atom<float>, 16, 8>(); });
});
Case const tma_plain("tma/load_without_swizzle", [] {
    expect_silence([] { return run_load_box<Layout<Shape<_8, _16>, Stride<_16, _1>>, 8, 16>(); });
});
Case const tma_early("planted/tma_destination_read_before_its_mbarrier", [] {
    expect_race("shared memory",
                [] { return run_load_box<GMMA::Layout_K_SW128_Atom<float>, 16, 32>(false); });
});

// A box of a [B, T, H, D] tensor comes in, is doubled, and goes out again; and once more by
// addition.
template <bool kFenced, bool kWaited>
__global__ void double_box(__grid_constant__ CUtensorMap const in,
                           __grid_constant__ CUtensorMap const out, bool add) {
    auto* const tile = reinterpret_cast<float*>(dyn_smem());  // [8 tokens][16]
    auto* const barrier = reinterpret_cast<uint64_t*>(dyn_smem() + 512);
    if (threadIdx.x == 0) cutlass::arch::ClusterTransactionBarrier::init(barrier, 1);
    __syncthreads();
    int const token = static_cast<int>(blockIdx.x) * 8, head = static_cast<int>(blockIdx.y),
              batch = static_cast<int>(blockIdx.z);
    if (threadIdx.x == 0) {
        cutlass::arch::ClusterTransactionBarrier::arrive_and_expect_tx(barrier, 512);
        SM90_TMA_LOAD_4D::copy(&in, barrier, 0, tile, 0, head, token, batch);
    }
    while (!cutlass::arch::ClusterBarrier::try_wait(barrier, 0)) {
    }
    for (int i = static_cast<int>(threadIdx.x); i < 128; i += 32) tile[i] *= 2;
    if constexpr (kFenced) tma_store_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        if (add) {
            SM90_TMA_REDUCE_ADD_4D::copy(&out, tile, 0, head, token, batch);
        } else {
            SM90_TMA_STORE_4D::copy(&out, tile, 0, head, token, batch);
        }
        tma_store_arrive();
        if constexpr (kWaited) tma_store_wait<0>();
    }
    if constexpr (!kWaited) {
        __syncthreads();
        if (threadIdx.x == 1) tile[0] = -1;
        if (threadIdx.x == 0) tma_store_wait<0>();
    }
}

template <bool kFenced = true, bool kWaited = true>
bool run_double_box(bool add = false) {
    constexpr int B = 2, T = 13, H = 3, D = 16;
    std::vector<float4> x_memory(B * T * H * D / 4), y_memory(B * T * H * D / 4);
    auto *const x = reinterpret_cast<float*>(x_memory.data()), *const y = reinterpret_cast<float*>(
                                                                   y_memory.data());
    for (int i = 0; i < B * T * H * D; ++i) x[i] = static_cast<float>(i), y[i] = 1000.0f;
    alignas(64) CUtensorMap maps[2];
    cuuint64_t const size[4] = {D, H, T, B}, stride[3] = {D * 4, H * D * 4, T * H * D * 4};
    cuuint32_t const box[4] = {D, 1, 8, 1}, one[4] = {1, 1, 1, 1};
    for (int i = 0; i < 2; ++i) {
        CUresult const status = cuTensorMapEncodeTiled(
            &maps[i], CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 4, i == 0 ? x : y, size, stride, box, one,
            CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_64B,
            CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
        require(status == CUDA_SUCCESS, "encode ", status);
    }
    launch(double_box<kFenced, kWaited>, dim3(2, H, B), dim3(32), 528, nullptr, maps[0], maps[1],
           add);
    require(last_counters().global_read_bytes == sizeof(float) * B * T * H * D, "bytes");
    for (int i = 0; i < B * T * H * D; ++i) {
        if (y[i] != 2 * x[i] + (add ? 1000.0f : 0.0f)) return false;
    }
    return true;
}
Case const tma_store("tma/load_and_store_4d",
                     [] { expect_silence([] { return run_double_box(); }); });
Case const tma_add("tma/reduce_add", [] { expect_silence([] { return run_double_box(true); }); });
Case const tma_cached("cache/tma_boxes", [] {
    constexpr uint64_t kBytes = sizeof(float) * 2 * 13 * 3 * 16;
    for (bool add : {false, true}) {
        emu::set_cache(1 << 16);
        run_double_box(add);
        auto const& c = last_counters();
        emu::set_cache(0);
        // A tensor may begin and end with half a sector.
        require(c.memory_read_bytes - kBytes * (add ? 2 : 1) <= 64, "read ", c.memory_read_bytes);
        require(c.memory_write_bytes - kBytes <= 32, "wrote ", c.memory_write_bytes);
    }
});
Case const store_unfenced("planted/fence_proxy_missing_before_tma_store", [] {
    expect_only_race("fence.proxy.async", [] { return run_double_box<false>(); });
});
Case const store_overwritten("planted/tma_store_source_overwritten_before_its_wait", [] {
    expect_race("race on shared memory", [] { return run_double_box<true, false>(); });
});

// Boxes of every rank go in and out; what came in is also handed back as it lay in shared memory.
template <int kRank>
struct TmaOps;
#define LSM_TMA_RANK(n)                         \
    template <>                                 \
    struct TmaOps<n> {                          \
        using Load = SM90_TMA_LOAD_##n##D;      \
        using Store = SM90_TMA_STORE_##n##D;    \
        using Add = SM90_TMA_REDUCE_ADD_##n##D; \
    };
LSM_TMA_RANK(1)
LSM_TMA_RANK(2)
LSM_TMA_RANK(3)
LSM_TMA_RANK(4)
LSM_TMA_RANK(5)
#undef LSM_TMA_RANK

// A tensor, innermost dimension first, and the boxes that cover it, some beyond its edge.
constexpr int kSizes[5] = {12, 3, 4, 3, 2}, kBox[5] = {8, 2, 2, 1, 2}, kBoxes[5] = {2, 2, 2, 3, 1};

struct Coordinates {
    int32_t at[5];
};
LSM_DEVICE Coordinates corner(int box) {
    Coordinates c{};
    for (int d = 0; d < 5; ++d) {
        c.at[d] = box % kBoxes[d] * kBox[d];
        box /= kBoxes[d];
    }
    return c;
}

template <int kRank>
__global__ void move_boxes(__grid_constant__ CUtensorMap const in,
                           __grid_constant__ CUtensorMap const out, float* seen) {
    auto* const tile = reinterpret_cast<float*>(dyn_smem());
    auto* const barrier = reinterpret_cast<uint64_t*>(dyn_smem() + 512);
    using Barrier = cutlass::arch::ClusterTransactionBarrier;
    int elements = 1;
    for (int d = 0; d < kRank; ++d) elements *= kBox[d];
    Coordinates const c = corner(static_cast<int>(blockIdx.x));
    auto const with_coordinates =
        [&]<std::size_t... I>(auto const& copy, std::index_sequence<I...>) { copy(c.at[I]...); };
    auto const each = std::make_index_sequence<kRank>{};
    if (threadIdx.x == 0) {
        Barrier::init(barrier, 1);
        Barrier::arrive_and_expect_tx(barrier, static_cast<uint32_t>(4 * elements));
        with_coordinates(
            [&](auto... at) { TmaOps<kRank>::Load::copy(&in, barrier, 0, tile, at...); }, each);
    }
    __syncthreads();
    Barrier::wait(barrier, 0);
    for (int i = static_cast<int>(threadIdx.x); i < elements; i += 32)
        seen[static_cast<int>(blockIdx.x) * elements + i] = tile[i];
    __syncthreads();
    if (threadIdx.x == 0) {
        with_coordinates([&](auto... at) { TmaOps<kRank>::Store::copy(&out, tile, at...); }, each);
        tma_store_arrive();
        tma_store_wait<0>();
        with_coordinates([&](auto... at) { TmaOps<kRank>::Add::copy(&out, tile, at...); }, each);
        tma_store_arrive();
        tma_store_wait<0>();
    }
}

CUtensorMap encode(void* address, CUtensorMapDataType type, int rank, int const* sizes,
                   int const* box, int element_bytes) {
    alignas(64) CUtensorMap map;
    cuuint64_t size[5], stride[4], step = static_cast<cuuint64_t>(element_bytes);
    cuuint32_t extent[5], one[5];
    for (int d = 0; d < rank; ++d) {
        size[d] = static_cast<cuuint64_t>(sizes[d]);
        extent[d] = static_cast<cuuint32_t>(box[d]);
        one[d] = 1;
        step *= size[d];
        if (d + 1 < rank) stride[d] = step;
    }
    CUresult const status = cuTensorMapEncodeTiled(
        &map, type, static_cast<cuuint32_t>(rank), address, size, stride, extent, one,
        CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    require(status == CUDA_SUCCESS, "encode ", status);
    return map;
}

template <int kRank>
bool run_boxes() {
    int numel = 1, elements = 1, boxes = 1;
    for (int d = 0; d < kRank; ++d) numel *= kSizes[d], elements *= kBox[d], boxes *= kBoxes[d];
    std::vector<float4> x_memory(static_cast<std::size_t>(numel / 4)), y_memory(x_memory.size());
    auto *const x = reinterpret_cast<float*>(x_memory.data()), *const y = reinterpret_cast<float*>(
                                                                   y_memory.data());
    for (int i = 0; i < numel; ++i) x[i] = static_cast<float>(i + 1), y[i] = -1.0f;
    std::vector<float> seen(static_cast<std::size_t>(boxes * elements));
    auto const map = [&](float* p) {
        return encode(p, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, kRank, kSizes, kBox, 4);
    };
    launch(move_boxes<kRank>, dim3(static_cast<unsigned>(boxes)), dim3(32), 520, nullptr, map(x),
           map(y), seen.data());
    for (int box = 0; box < boxes; ++box) {
        Coordinates const first = corner(box);
        for (int i = 0; i < elements; ++i) {
            int at = 0, stride = 1, rest = i;
            bool inside = true;
            for (int d = 0; d < kRank; ++d) {
                int const coordinate = first.at[d] + rest % kBox[d];
                inside = inside && coordinate < kSizes[d];
                at += coordinate * stride;
                stride *= kSizes[d];
                rest /= kBox[d];
            }
            if (seen[static_cast<std::size_t>(box * elements + i)] != (inside ? x[at] : 0.0f))
                return false;
        }
    }
    for (int i = 0; i < numel; ++i) {
        if (y[i] != 2 * x[i]) return false;
    }
    return true;
}
Case const every_rank("tma/every_rank", [] {
    expect_silence([] {
        return run_boxes<1>() && run_boxes<2>() && run_boxes<3>() && run_boxes<4>() &&
               run_boxes<5>();
    });
});

// y += x for one row of any element type.
__global__ void add_row(__grid_constant__ CUtensorMap const y, char const* x, int bytes) {
    for (int i = static_cast<int>(threadIdx.x); i < bytes; i += 32) dyn_smem()[i] = x[i];
    tma_store_fence();
    __syncthreads();
    if (threadIdx.x != 0) return;
    SM90_TMA_REDUCE_ADD_1D::copy(&y, dyn_smem(), 0);
    tma_store_arrive();
    tma_store_wait<0>();
}
template <class T>
bool run_add_row(CUtensorMapDataType type) {
    constexpr int kCount = 32 / sizeof(T);
    alignas(16) T x[kCount], y[kCount];
    for (int i = 0; i < kCount; ++i) x[i] = T(static_cast<float>(i - 3)), y[i] = T(0.5f);
    int const size[1] = {kCount};
    launch(add_row, dim3(2), dim3(32), 32, nullptr, encode(y, type, 1, size, size, sizeof(T)),
           reinterpret_cast<char const*>(x), 32);
    for (int i = 0; i < kCount; ++i) {
        float const start = static_cast<float>(T(0.5f));
        if (static_cast<float>(y[i]) != start + 2 * static_cast<float>(i - 3)) return false;
    }
    return true;
}
Case const add_types("tma/reduce_add_of_each_type", [] {
    expect_silence([] {
        return run_add_row<float>(CU_TENSOR_MAP_DATA_TYPE_FLOAT32) &&
               run_add_row<int32_t>(CU_TENSOR_MAP_DATA_TYPE_INT32) &&
               run_add_row<cute::half_t>(CU_TENSOR_MAP_DATA_TYPE_FLOAT16) &&
               run_add_row<cute::bfloat16_t>(CU_TENSOR_MAP_DATA_TYPE_BFLOAT16);
    });
});
Case const add_bytes("planted/tma_reduction_of_bytes", [] {
    expect_report("no addition for this element type",
                  [] { run_add_row<uint8_t>(CU_TENSOR_MAP_DATA_TYPE_UINT8); });
});

template <bool kWaited>
__global__ void store_bulk(float* y) {
    auto* const tile = reinterpret_cast<float*>(dyn_smem());
    tile[threadIdx.x] = static_cast<float>(threadIdx.x);
    tma_store_fence();
    __syncthreads();
    if (threadIdx.x != 0) return;
    SM90_BULK_COPY_S2G::copy(tile, y, 64);
    tma_store_arrive();
    SM90_BULK_COPY_S2G::copy(tile + 16, y + 16, 64);
    tma_store_arrive();
    if constexpr (kWaited) tma_store_wait<1>();
    y[32] = y[0];
    if constexpr (kWaited) tma_store_wait<0>();
}
template <bool kWaited>
bool run_store_bulk() {
    std::vector<float4> memory(9, float4{-1, -1, -1, -1});
    auto* const y = reinterpret_cast<float*>(memory.data());
    launch(store_bulk<kWaited>, dim3(1), dim3(32), 128, nullptr, y);
    for (int i = 0; i < 32; ++i) {
        if (y[i] != static_cast<float>(i)) return false;
    }
    return y[32] == 0.0f && last_counters().global_write_bytes == 128;
}
Case const bulk_store("tma/bulk_store", [] { expect_silence(run_store_bulk<true>); });
Case const bulk_exit("planted/exit_with_tma_store_in_flight", [] {
    expect_report("exited with a TMA store in flight", [] { run_store_bulk<false>(); });
});

// A producer warp keeps a ring of stages full for a consumer warpgroup. A cp.async announces itself
// in place of the lane's arrival, or (counted) besides it.
enum class Producer { bulk, async, async_counted };
template <Producer kProducer>
__global__ void ring(float const* x, float* y, int steps) {
    constexpr bool kBulk = kProducer == Producer::bulk;
    constexpr int kStages = 3;
    auto* const stage = reinterpret_cast<float*>(dyn_smem());  // [3][128]
    auto* const full = reinterpret_cast<uint64_t*>(dyn_smem() + 1536);
    uint64_t* const empty = full + kStages;
    using Barrier = cutlass::arch::ClusterTransactionBarrier;
    if (threadIdx.x == 0) {
        for (int s = 0; s < kStages; ++s) {
            Barrier::init(full + s, kBulk ? 1 : 32);
            Barrier::init(empty + s, 128);
        }
        cutlass::arch::fence_barrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= 128) {
        if (kBulk && !elect_one_sync()) return;
        for (int i = 0; i < steps; ++i) {
            int const s = i % kStages;
            if (i >= kStages)
                Barrier::wait(empty + s, static_cast<uint32_t>((i / kStages - 1) & 1));
            if constexpr (kBulk) {
                Barrier::arrive_and_expect_tx(full + s, 512);
                SM90_BULK_COPY_G2S::copy(x + 128 * i, full + s, stage + 128 * s, 512);
            } else {
                int const lane = static_cast<int>(threadIdx.x) - 128;
                cp_async16(smem_u32(stage + 128 * s + 4 * lane), x + 128 * i + 4 * lane, true);
                if constexpr (kProducer == Producer::async) {
                    cutlass::arch::cpasync_barrier_arrive_noinc(full + s);
                } else {
                    cutlass::arch::cpasync_barrier_arrive(full + s);
                    Barrier::arrive(full + s);
                }
            }
        }
    } else {
        cutlass::arch::warpgroup_reg_alloc<240>();
        float sum = 0;
        for (int i = 0; i < steps; ++i) {
            int const s = i % kStages;
            Barrier::wait(full + s, static_cast<uint32_t>((i / kStages) & 1));
            sum += stage[128 * s + (127 - static_cast<int>(threadIdx.x))];
            Barrier::arrive(empty + s);
            if (i % 2 == 0) cutlass::arch::NamedBarrier::sync(128, 1);
        }
        y[threadIdx.x] = sum;
    }
}
template <Producer kProducer>
bool run_ring() {
    int const steps = 8;
    std::vector<float4> memory(32 * steps);
    auto* const x = reinterpret_cast<float*>(memory.data());
    std::vector<float> y(128);
    for (int i = 0; i < 128 * steps; ++i) x[i] = static_cast<float>(i);
    launch(ring<kProducer>, dim3(1), dim3(160), 1536 + 48, nullptr, static_cast<float const*>(x),
           y.data(), steps);
    for (int t = 0; t < 128; ++t) {
        if (y[static_cast<std::size_t>(t)] != steps * (127 - t) + 128 * steps * (steps - 1) / 2)
            return false;
    }
    return true;
}
Case const bulk_ring("tma/producer_warp_with_bulk_copies",
                     [] { expect_silence(run_ring<Producer::bulk>); });
Case const async_ring("tma/producer_warp_with_cp_async",
                      [] { expect_silence(run_ring<Producer::async>); });
Case const counted_ring("tma/producer_warp_with_counted_cp_async",
                        [] { expect_silence(run_ring<Producer::async_counted>); });

__global__ void unknown_barrier() {
    arrive_barrier(*reinterpret_cast<uint64_t*>(dyn_smem()));
}
Case const uninitialised("planted/mbarrier_not_initialised", [] {
    expect_report("no initialised mbarrier",
                  [] { launch(unknown_barrier, dim3(1), dim3(1), 16, nullptr); });
});

__global__ void four_phases() {
    auto& barrier = *reinterpret_cast<uint64_t*>(dyn_smem());
    if (threadIdx.x == 0) initialize_barrier(barrier, 64);
    __syncthreads();
    for (int phase = 0; phase < 4; ++phase) {
        arrive_barrier(barrier);
        wait_barrier(barrier, phase % 2);
    }
}
Case const phases("tma/four_phases", [] {
    expect_silence([] {
        launch(four_phases, dim3(1), dim3(64), 16, nullptr);
        return true;
    });
});

// Bytes are expected and delivered by hand; then the barrier becomes plain memory, and another one.
__global__ void transactions(int* y) {
    using Barrier = cutlass::arch::ClusterTransactionBarrier;
    auto* const word = reinterpret_cast<uint64_t*>(dyn_smem());
    auto const& barrier = *reinterpret_cast<Barrier const*>(word);
    if (threadIdx.x == 0) {
        barrier.init(1);
        barrier.expect_transaction(48);
        barrier.arrive();
        y[0] = barrier.test_wait(0);
        barrier.complete_transaction(16);
        y[1] = barrier.test_wait(0);
        barrier.complete_transaction(32);
        y[2] = barrier.test_wait(0) && !barrier.test_wait(1);
        Barrier::invalidate(word);
        *word = 7;
        y[3] = static_cast<int>(*word);
        barrier.init(1);
        y[4] = barrier.test_wait(0);
        barrier.arrive();
        y[5] = barrier.test_wait(0);
    }
}
Case const by_hand("tma/transactions_by_hand", [] {
    expect_silence([] {
        std::vector<int> y(6, -1);
        launch(transactions, dim3(1), dim3(32), 8, nullptr, y.data());
        return y == std::vector<int>{0, 0, 1, 7, 0, 1};
    });
});

// ---- Misuse ----

enum class Misuse { arrivals, overwritten, rank, alignment, no_map, in_flight, async_in_flight };
template <Misuse kMisuse>
__global__ void misuse(__grid_constant__ CUtensorMap const map, float const* x) {
    using Barrier = cutlass::arch::ClusterTransactionBarrier;
    auto* const barrier = reinterpret_cast<uint64_t*>(dyn_smem() + 256);
    if (threadIdx.x != 0) return;
    Barrier::init(barrier, 1);
    if constexpr (kMisuse == Misuse::arrivals) {
        Barrier::expect_transaction(barrier, 16);
        Barrier::arrive(barrier);
        Barrier::arrive(barrier);
    } else if constexpr (kMisuse == Misuse::overwritten) {
        *barrier = 0;
        Barrier::arrive(barrier);
    } else if constexpr (kMisuse == Misuse::rank) {
        SM90_TMA_LOAD_2D::copy(&map, barrier, 0, dyn_smem(), 0, 0);
    } else if constexpr (kMisuse == Misuse::alignment) {
        SM90_TMA_LOAD_1D::copy(&map, barrier, 0, dyn_smem() + 64, 0);
    } else if constexpr (kMisuse == Misuse::no_map) {
        CUtensorMap const empty{};
        SM90_TMA_LOAD_1D::copy(&empty, barrier, 0, dyn_smem(), 0);
    } else if constexpr (kMisuse == Misuse::in_flight) {
        Barrier::arrive_and_expect_tx(barrier, 32);
        SM90_TMA_LOAD_1D::copy(&map, barrier, 0, dyn_smem(), 0);
    } else {
        cp_async16(smem_u32(dyn_smem()), x, true);
        cutlass::arch::cpasync_barrier_arrive_noinc(barrier);
    }
}
template <Misuse kMisuse>
void expect_misuse(char const* expected) {
    expect_report(expected, [] {
        alignas(16) static float x[8];
        int const size[1] = {8};
        launch(misuse<kMisuse>, dim3(1), dim3(32), 264, nullptr,
               encode(x, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 1, size, size, 4),
               static_cast<float const*>(x));
    });
}
Case const arrivals("planted/mbarrier_with_too_many_arrivals",
                    [] { expect_misuse<Misuse::arrivals>("more arrivals than the 1 expected"); });
Case const overwritten("planted/mbarrier_overwritten",
                       [] { expect_misuse<Misuse::overwritten>("bytes were overwritten"); });
Case const rank("planted/tensor_map_of_another_rank",
                [] { expect_misuse<Misuse::rank>("2 coordinates for a map of rank 1"); });
Case const alignment("planted/tma_destination_misaligned",
                     [] { expect_misuse<Misuse::alignment>("must be 128-byte aligned"); });
Case const no_map("planted/tensor_map_not_encoded",
                  [] { expect_misuse<Misuse::no_map>("not a tensor map"); });
Case const load_left("planted/block_ends_with_tma_load_in_flight",
                     [] { expect_misuse<Misuse::in_flight>("ended with a TMA load in flight"); });
Case const async_left("planted/block_ends_with_announced_cp_async_in_flight", [] {
    expect_misuse<Misuse::async_in_flight>("that an mbarrier was to announce");
});

__global__ void disagree_on_registers() {
    if (threadIdx.x < 64) {
        cutlass::arch::warpgroup_reg_alloc<240>();
    } else {
        cutlass::arch::warpgroup_reg_alloc<232>();
    }
}
Case const registers("planted/setmaxnreg_differs_in_a_warpgroup", [] {
    expect_report("setmaxnreg: the threads of a warpgroup disagree",
                  [] { launch(disagree_on_registers, dim3(1), dim3(128), 0, nullptr); });
});

}  // namespace
}  // namespace lsm::test
