// Shared addresses, global accesses, atomics, and cp.async.
#include <algorithm>
#include <bit>

#include "emu/cache.h"
#include "emu/counters.h"
#include "emu/internal.h"
#include "emu/mma.h"
#include "emu/race.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace lsm::emu {

char* shared_base() {
    return world.shared;
}

u32 shared_offset(void const* pointer) {
    auto const distance = static_cast<char const*>(pointer) - world.shared;
    // One past the end is an address too; what is read there is checked at the access.
    if (distance < 0 || distance > static_cast<std::ptrdiff_t>(world.shared_bytes)) {
        fail_at("out of bounds: a pointer that is not in shared memory (" +
                    std::to_string(world.shared_bytes) +
                    " bytes) was converted to a shared address",
                LSM_EMU_SITE);
    }
    return static_cast<u32>(distance) + kSharedWindow;
}

char* shared_pointer(u32 offset, u32 bytes, char const* what, void const* site) {
    u32 const at = offset - kSharedWindow;
    if (offset < kSharedWindow || at + bytes > world.shared_bytes) {
        fail_at("out of bounds: " + std::string(what) + " of " + std::to_string(bytes) +
                    " bytes at shared memory + " + std::to_string(static_cast<int>(at)) +
                    ", which has " + std::to_string(world.shared_bytes) + " bytes",
                site);
    }
    if (offset % bytes != 0) {
        fail_at("misaligned: " + std::string(what) + " of " + std::to_string(bytes) +
                    " bytes at shared memory + " + std::to_string(at),
                site);
    }
    return world.shared + at;
}

void check_global_alignment(void const* address, u32 bytes, void const* site) {
    if (reinterpret_cast<u64>(address) % bytes != 0) {
        fail_at("misaligned: a " + std::to_string(bytes) + "-byte global access at " +
                    hex(reinterpret_cast<u64>(address)),
                site);
    }
}

void note_global(void const* address, u32 bytes, bool write) {
    if (world.current == nullptr) return;
    void const* const site = LSM_EMU_SITE;
    if (in_shared(address)) fail_at("a global access was given a pointer to shared memory", site);
    check_global_alignment(address, bytes, site);
    log_access(*world.current, address, bytes,
               write ? AccessKind::global_write : AccessKind::global_read, site);
}

namespace {

char* shared_access(void const* pointer, u32 bytes, bool write, void const* site) {
    Thread& t = *world.current;
    char* const p = shared_pointer(shared_offset(pointer), bytes, write ? "store" : "load", site);
    if constexpr (kRace)
        race::access(t, p, bytes, write ? race::Kind::write : race::Kind::read, site);
    log_access(t, p, bytes, write ? AccessKind::shared_write : AccessKind::shared_read, site);
    return p;
}

}  // namespace

void load_shared(void* destination, void const* source, u32 bytes) {
    std::memcpy(destination, shared_access(source, bytes, false, LSM_EMU_SITE), bytes);
}

void store_shared(void* destination, void const* source, u32 bytes) {
    std::memcpy(shared_access(destination, bytes, true, LSM_EMU_SITE), source, bytes);
}

// ---- Atomics ----

namespace {

template <class T>
T take(u64 bits) {
    T value;
    std::memcpy(static_cast<void*>(&value), &bits, sizeof(T));
    return value;
}

template <class T>
T combine(Atomic operation, T old, T value, T compare) {
    switch (operation) {
        case Atomic::add:
            return old + value;
        case Atomic::minimum:
            return std::min(old, value);
        case Atomic::maximum:
            return std::max(old, value);
        case Atomic::exchange:
            return value;
        default:
            break;
    }
    if constexpr (std::is_integral_v<T>) {
        switch (operation) {
            case Atomic::bit_and:
                return old & value;
            case Atomic::bit_or:
                return old | value;
            case Atomic::bit_xor:
                return old ^ value;
            case Atomic::compare_exchange:
                return old == compare ? value : old;
            case Atomic::increment:
                return old >= value ? T{0} : old + 1;
            case Atomic::decrement:
                return old == 0 || old > value ? value : old - 1;
            default:
                break;
        }
    }
    fail("no such atomic in CUDA");
}

__half2 add(__half2 a, __half2 b) {
    return __floats2half2_rn(__low2float(a) + __low2float(b), __high2float(a) + __high2float(b));
}
__nv_bfloat162 add(__nv_bfloat162 a, __nv_bfloat162 b) {
    return __floats2bfloat162_rn(__low2float(a) + __low2float(b),
                                 __high2float(a) + __high2float(b));
}

template <class T>
u64 modify(Atomic operation, void* address, u64 value, u64 compare) {
    T old;
    std::memcpy(static_cast<void*>(&old), address, sizeof(T));
    T updated;
    if constexpr (std::is_arithmetic_v<T>) {
        updated = combine(operation, old, take<T>(value), take<T>(compare));
    } else {
        updated = add(old, take<T>(value));
    }
    std::memcpy(address, &updated, sizeof(T));
    u64 bits = 0;
    std::memcpy(&bits, &old, sizeof(T));
    return bits;
}

}  // namespace

u64 atomic(Atomic operation, Number type, void* address, u64 value, u64 compare) {
    void const* const site = LSM_EMU_SITE;
    u32 const bytes = type == Number::u64 || type == Number::f64 ? 8 : 4;
    check_global_alignment(address, bytes, site);
    ++counters.atomics;
    ++world.progress;
    if (has_cache() && world.current != nullptr && !in_shared(address))
        log_access(*world.current, address, bytes, AccessKind::atomic, site);
    if constexpr (kRace) {
        if (world.current != nullptr) {
            race::access(*world.current, address, bytes, race::Kind::atomic, site);
            race::global_atomic(*world.current, address);
        }
    }
    switch (type) {
        case Number::i32:
            return modify<int32_t>(operation, address, value, compare);
        case Number::u32:
            return modify<u32>(operation, address, value, compare);
        case Number::u64:
            return modify<u64>(operation, address, value, compare);
        case Number::f32:
            return modify<float>(operation, address, value, compare);
        case Number::f64:
            return modify<double>(operation, address, value, compare);
        case Number::f16x2:
            return modify<__half2>(operation, address, value, compare);
        case Number::bf16x2:
            return modify<__nv_bfloat162>(operation, address, value, compare);
    }
    __builtin_unreachable();
}

void threadfence() {
    if constexpr (kRace) race::global_fence(*world.current);
}

// ---- cp.async ----

void cp_async(u32 destination, void const* source, u32 bytes, u32 source_bytes) {
    Thread& t = *world.current;
    t.site = LSM_EMU_SITE;
    char* const to = shared_pointer(destination, bytes, "cp.async", t.site);
    if (source_bytes > bytes)
        fail_at("cp.async: the source is longer than the destination", t.site);
    if (source_bytes > 0) {
        check_global_alignment(source, bytes, t.site);
        if (in_shared(source)) fail_at("cp.async: the source is in shared memory", t.site);
        log_access(t, source, source_bytes, AccessKind::global_read, t.site);
        counters.async_bytes += source_bytes;
    }
    if constexpr (kRace) {
        if (source_bytes > 0) race::access(t, source, source_bytes, race::Kind::read, t.site);
        race::async_issue(t, to, bytes, t.site);
    }
    log_access(t, to, bytes, AccessKind::shared_write, t.site);
    std::memset(to, 0xff, bytes);
    t.copies.push_back({to, static_cast<char const*>(source), bytes, source_bytes, t.site});
}

void land_copies(Thread& t, u32 end) {
    for (; t.copies_landed < end; ++t.copies_landed) {
        Copy const& c = t.copies[t.copies_landed];
        if (c.source_bytes > 0) std::memcpy(c.destination, c.source, c.source_bytes);
        std::memset(c.destination + c.source_bytes, 0, c.bytes - c.source_bytes);
        if constexpr (kRace) race::async_land(t, c.destination, c.bytes, race::Kind::write, c.site);
    }
    if (t.copies_landed == t.copies.size()) {
        t.copies.clear();
        t.copies_landed = 0;
        for (u32& end_of_group : t.copy_groups) end_of_group = 0;
    } else if (t.copies_landed > 256) {
        t.copies.erase(t.copies.begin(), t.copies.begin() + t.copies_landed);
        for (u32& end_of_group : t.copy_groups) end_of_group -= t.copies_landed;
        t.copies_landed = 0;
    }
}

void cp_async_commit() {
    Thread& t = *world.current;
    t.copy_groups.push_back(static_cast<u32>(t.copies.size()));
}

void cp_async_wait(u32 pending) {
    Thread& t = *world.current;
    auto const groups = static_cast<u32>(t.copy_groups.size());
    if (groups <= pending) return;
    u32 const end = t.copy_groups[groups - pending - 1];
    t.copy_groups.erase(t.copy_groups.begin(), t.copy_groups.end() - pending);
    land_copies(t, end);
}

void cp_async_wait_all() {
    Thread& t = *world.current;
    t.copy_groups.clear();
    land_copies(t, static_cast<u32>(t.copies.size()));
}

void check_thread_exit(Thread& t) {
    if (t.copies_landed < t.copies.size()) {
        fail("a thread exited with a cp.async in flight\n  by " + describe_thread(t) +
             "\n  issued at " + describe_site(t.copies[t.copies_landed].site));
    }
    if (!t.bulk_stores.empty()) {
        fail("a thread exited with a TMA store in flight\n  by " + describe_thread(t) +
             "\n  issued at " + describe_site(t.bulk_stores.front().site));
    }
}

}  // namespace lsm::emu
