// The tensor memory accelerator: a tensor map encoded on the host, boxes of up to five dimensions,
// bulk copies.
#include <cuda.h>

#include <algorithm>

#include "emu/cache.h"
#include "emu/counters.h"
#include "emu/internal.h"
#include "emu/mma.h"
#include "emu/race.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lsm::emu {

void send_to_mbarrier(u32 offset, std::vector<BulkCopy>&& pieces, void const* site);

namespace {

constexpr u32 kMagic = 0x544d4150;

struct Map {
    u32 magic;
    u8 rank, element_bytes, swizzle_bits;
    Element element;
    u64 address;
    u64 size[5];
    u64 stride[4];  // bytes, of dimensions 1..
    u32 box[5];
};
static_assert(sizeof(Map) <= sizeof(CUtensorMap));

Map const& decode(void const* map, int rank, char const* op, void const* site) {
    auto const& m = *static_cast<Map const*>(map);
    if (reinterpret_cast<u64>(map) % 64 != 0)
        fail_at(std::string(op) + ": the tensor map is not 64-byte aligned", site);
    if (m.magic != kMagic) fail_at(std::string(op) + ": not a tensor map", site);
    if (m.rank != rank) {
        fail_at(std::string(op) + ": " + std::to_string(rank) + " coordinates for a map of rank " +
                    std::to_string(m.rank),
                site);
    }
    return m;
}

// Calls f(global, shared, bytes) for each 16-byte piece of the box in shared memory; global is null
// outside the tensor. Pieces may be cut by the tensor's edge: then a second call has the rest, with
// a null pointer.
template <class F>
void each_piece(Map const& m, u32 shared, int const* coordinate, char const* op, void const* site,
                F&& f) {
    u32 const row_bytes = m.box[0] * m.element_bytes;
    u32 index[5] = {}, rows = 1;
    for (int d = 1; d < m.rank; ++d) rows *= m.box[d];
    if (shared % 128 != 0)
        fail_at(std::string("misaligned: ") + op + ": shared memory must be 128-byte aligned",
                site);
    shared_pointer(shared, 16, op, site);
    shared_pointer(shared + rows * row_bytes - 16, 16, op, site);
    for (u32 r = 0; r < rows; ++r) {
        bool inside = true;
        u64 address = m.address;
        for (int d = 1; d < m.rank; ++d) {
            int64_t const at = static_cast<int64_t>(coordinate[d]) + index[d];
            inside = inside && at >= 0 && at < static_cast<int64_t>(m.size[d]);
            address += static_cast<u64>(at) * m.stride[d - 1];
        }
        int64_t const begin = static_cast<int64_t>(coordinate[0]) * m.element_bytes;
        int64_t const end = static_cast<int64_t>(m.size[0] * m.element_bytes);
        for (u32 at = 0; at < row_bytes; at += 16) {
            u32 const to = swizzle(shared + r * row_bytes + at, m.swizzle_bits);
            u32 const bytes = std::min(16u, row_bytes - at);
            for (u32 done = 0; done < bytes;) {
                int64_t const x = begin + at + done;
                bool const here = inside && x >= 0 && x < end;
                u32 n = bytes - done;
                if (here) n = static_cast<u32>(std::min<int64_t>(n, end - x));
                if (!here && inside && x < 0) n = static_cast<u32>(std::min<int64_t>(n, -x));
                f(here ? reinterpret_cast<char*>(address + static_cast<u64>(x)) : nullptr,
                  to + done, n);
                done += n;
            }
        }
        for (int d = 1; d < m.rank; ++d) {
            if (++index[d] < m.box[d]) break;
            index[d] = 0;
        }
    }
}

// Sectors of consecutive pieces are counted once.
struct SectorCount {
    bool reads, writes;  // both: a reduction, in the cache
    u64 last = ~0ull, sectors = 0, bytes = 0;
    void add(void const* p, u32 n) {
        u64 const first = reinterpret_cast<u64>(p) / 32,
                  end = (reinterpret_cast<u64>(p) + n - 1) / 32;
        for (u64 s = first; s <= end; ++s) {
            if (s != last) ++sectors;
            last = s;
        }
        bytes += n;
        cache_access(reinterpret_cast<u64>(p), n, reads, writes);
    }
};

void count_read(SectorCount const& c) {
    counters.global_read_bytes += c.bytes;
    counters.async_bytes += c.bytes;
    counters.global_read_sectors += c.sectors;
    ++counters.global_reads;
}

void count_write(SectorCount const& c) {
    counters.global_write_bytes += c.bytes;
    counters.global_write_sectors += c.sectors;
    ++counters.global_writes;
}

std::shared_ptr<Clock> publish(Thread& t) {
    std::shared_ptr<Clock> clock;
    if constexpr (kRace) race::release(t, clock);
    return clock;
}

void begin_load(Thread& t, char* to, char const* from, u32 bytes, void const* site) {
    if constexpr (kRace) {
        if (from != nullptr) race::access(t, from, bytes, race::Kind::read, site);
        race::bulk_issue(t, to, bytes, site);
    }
    std::memset(to, 0xff, bytes);
}

template <class T, class Load, class Make>
void add_to(char* to, char const* from, u32 bytes, Load load, Make make) {
    for (u32 i = 0; i + sizeof(T) <= bytes; i += sizeof(T)) {
        T a, b;
        std::memcpy(static_cast<void*>(&a), to + i, sizeof(T));
        std::memcpy(static_cast<void*>(&b), from + i, sizeof(T));
        a = make(load(a) + load(b));
        std::memcpy(to + i, &a, sizeof(T));
    }
}

void carry_out(Thread& t, BulkCopy const& c) {
    if constexpr (kRace) {
        race::access(t, c.source, c.bytes, race::Kind::read, c.site);
        race::access(t, c.destination, c.bytes, c.add ? race::Kind::atomic : race::Kind::write,
                     c.site);
    }
    if (!c.add) {
        std::memcpy(c.destination, c.source, c.bytes);
        return;
    }
    auto same = [](auto x) { return x; };
    switch (c.element) {
        case Element::f32:
            add_to<float>(c.destination, c.source, c.bytes, same, same);
            break;
        case Element::i32:
            add_to<int32_t>(c.destination, c.source, c.bytes, same, same);
            break;
        case Element::f16:
            add_to<__half>(c.destination, c.source, c.bytes, __half2float, __float2half_rn);
            break;
        case Element::bf16:
            add_to<__nv_bfloat16>(c.destination, c.source, c.bytes, __bfloat162float,
                                  __float2bfloat16_rn);
            break;
        case Element::bytes:
            fail_at("TMA reduction: no addition for this element type", c.site);
    }
}

void check_bulk(u32 shared, void const* global, u32 bytes, char const* op, void const* site) {
    if (bytes == 0 || bytes % 16 != 0)
        fail_at(std::string(op) + ": " + std::to_string(bytes) + " bytes are not whole 16s", site);
    check_global_alignment(global, 16, site);
    shared_pointer(shared, 16, op, site);
    shared_pointer(shared + bytes - 16, 16, op, site);
}

}  // namespace

void tma_load(void const* map, u32 barrier, u32 destination, int rank, int const* coordinate) {
    void const* const site = LSM_EMU_SITE;
    Thread& t = *world.current;
    Map const& m = decode(map, rank, "TMA load", site);
    std::vector<BulkCopy> pieces;
    SectorCount count{true, false};
    each_piece(m, destination, coordinate, "TMA load", site,
               [&](char* global, u32 shared, u32 bytes) {
                   char* const to = world.shared + (shared - kSharedWindow);
                   if (global != nullptr) count.add(global, bytes);
                   begin_load(t, to, global, bytes, site);
                   pieces.push_back({to, global, bytes, false, m.element, site, nullptr});
               });
    count_read(count);
    pieces.back().clock = publish(t);
    send_to_mbarrier(barrier, std::move(pieces), site);
}

void tma_store(void const* map, u32 source, int rank, int const* coordinate, bool add) {
    void const* const site = LSM_EMU_SITE;
    Thread& t = *world.current;
    Map const& m = decode(map, rank, "TMA store", site);
    SectorCount count{add, true};
    each_piece(m, source, coordinate, "TMA store", site, [&](char* global, u32 shared, u32 bytes) {
        if (global == nullptr) return;
        char* const from = world.shared + (shared - kSharedWindow);
        if constexpr (kRace) race::async_proxy_read(t, from, bytes, site);
        count.add(global, bytes);
        t.bulk_stores.push_back({global, from, bytes, add, m.element, site, nullptr});
    });
    count_write(count);
}

void bulk_load(void const* source, u32 barrier, u32 destination, u32 bytes) {
    void const* const site = LSM_EMU_SITE;
    Thread& t = *world.current;
    check_bulk(destination, source, bytes, "bulk load", site);
    char* const to = world.shared + (destination - kSharedWindow);
    auto const* const from = static_cast<char const*>(source);
    begin_load(t, to, from, bytes, site);
    SectorCount count{true, false};
    count.add(from, bytes);
    count_read(count);
    std::vector<BulkCopy> pieces;
    pieces.push_back({to, from, bytes, false, Element::bytes, site, publish(t)});
    send_to_mbarrier(barrier, std::move(pieces), site);
}

void bulk_store(void* destination, u32 source, u32 bytes) {
    void const* const site = LSM_EMU_SITE;
    Thread& t = *world.current;
    check_bulk(source, destination, bytes, "bulk store", site);
    char const* const from = world.shared + (source - kSharedWindow);
    if constexpr (kRace) race::async_proxy_read(t, from, bytes, site);
    SectorCount count{false, true};
    count.add(destination, bytes);
    count_write(count);
    t.bulk_stores.push_back(
        {static_cast<char*>(destination), from, bytes, false, Element::bytes, site, nullptr});
}

void bulk_commit() {
    Thread& t = *world.current;
    t.bulk_groups.push_back(static_cast<u32>(t.bulk_stores.size()));
}

void bulk_wait(u32 pending) {
    Thread& t = *world.current;
    auto const groups = static_cast<u32>(t.bulk_groups.size());
    if (groups <= pending) return;
    u32 const end = t.bulk_groups[groups - pending - 1];
    for (u32 i = 0; i < end; ++i) carry_out(t, t.bulk_stores[i]);
    t.bulk_stores.erase(t.bulk_stores.begin(), t.bulk_stores.begin() + end);
    t.bulk_groups.erase(t.bulk_groups.begin(), t.bulk_groups.end() - pending);
    for (u32& group : t.bulk_groups) group -= end;
}

}  // namespace lsm::emu

// The driver's function, for the host code of kernels: same checks, own encoding.
extern "C" __attribute__((visibility("hidden"))) CUresult cuTensorMapEncodeTiled(
    CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
    cuuint64_t const* size, cuuint64_t const* stride, cuuint32_t const* box,
    cuuint32_t const* element_stride, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
    using lsm::emu::Element;
    constexpr int kBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};
    if (rank < 1 || rank > 5 || static_cast<std::size_t>(type) >= std::size(kBytes))
        return CUDA_ERROR_INVALID_VALUE;
    if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B)
        return CUDA_ERROR_NOT_SUPPORTED;
    if (fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) return CUDA_ERROR_NOT_SUPPORTED;
    lsm::emu::Map m{};
    m.magic = lsm::emu::kMagic;
    m.rank = static_cast<lsm::emu::u8>(rank);
    m.element_bytes = static_cast<lsm::emu::u8>(kBytes[type]);
    m.swizzle_bits = static_cast<lsm::emu::u8>(swizzle);
    m.element = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT16    ? Element::f16
                : type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? Element::bf16
                : type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32  ? Element::f32
                : type == CU_TENSOR_MAP_DATA_TYPE_INT32    ? Element::i32
                                                           : Element::bytes;
    m.address = reinterpret_cast<lsm::emu::u64>(address);
    if (m.address % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    for (cuuint32_t d = 0; d < rank; ++d) {
        if (size[d] == 0 || size[d] > 1ull << 32 || box[d] == 0 || box[d] > 256 ||
            element_stride[d] != 1) {
            return CUDA_ERROR_INVALID_VALUE;
        }
        m.size[d] = size[d];
        m.box[d] = box[d];
        if (d > 0) m.stride[d - 1] = stride[d - 1];
        if (d > 0 && (stride[d - 1] % 16 != 0 || stride[d - 1] >= 1ull << 40))
            return CUDA_ERROR_INVALID_VALUE;
    }
    cuuint32_t const row = box[0] * m.element_bytes;
    if (row % 16 != 0 || (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && row > 16u << swizzle))
        return CUDA_ERROR_INVALID_VALUE;
    std::memset(static_cast<void*>(map), 0, sizeof *map);
    std::memcpy(static_cast<void*>(map), &m, sizeof m);
    return CUDA_SUCCESS;
}
