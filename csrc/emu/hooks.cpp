// The functions that -fsanitize=thread makes a kernel call at every plain access to memory. They
// are defined here, so that the race build needs no sanitizer runtime.
#include <algorithm>

#include "emu/counters.h"
#include "emu/internal.h"
#include "emu/race.h"

#if LSM_EMU_RACE

namespace lsm::emu {
namespace {

// The built-in variables are registers on a device.
bool is_builtin(void const* p) {
    auto within = [p](auto const& v) {
        return static_cast<u64>(static_cast<char const*>(p) - reinterpret_cast<char const*>(&v)) <
               sizeof v;
    };
    return within(threadIdx) || within(blockIdx) || within(blockDim) || within(gridDim);
}

inline void on_access(void* address, u32 bytes, race::Kind kind, bool aligned, void const* site) {
    Thread* const t = world.current;
    if (t == nullptr) return race::check_bounds(address, bytes, kind, site);  // a launcher's own
    if (on_fiber_stack(*t, address) || is_builtin(address)) return;
    t->site = site;
    if (aligned && reinterpret_cast<u64>(address) % bytes != 0) {
        fail_at("misaligned: a " + std::to_string(bytes) + "-byte access at " +
                    hex(reinterpret_cast<u64>(address)),
                site);
    }
    char const* const p = static_cast<char const*>(address);
    if (in_shared(p)) {
        if (!in_shared(p + bytes - 1))
            fail_at("out of bounds: access past the end of shared memory", site);
        log_access(*t, p, bytes,
                   kind == race::Kind::read ? AccessKind::shared_read : AccessKind::shared_write,
                   site);
    } else if (p >= world.shared - (1 << 18) && p < world.shared + world.shared_bytes + (1 << 20)) {
        fail_at("out of bounds: access to shared memory + " + std::to_string(p - world.shared) +
                    ", which has " + std::to_string(world.shared_bytes) + " bytes",
                site);
    }
    race::access(*t, address, bytes, kind, site);
    if (kind == race::Kind::atomic) race::global_atomic(*t, address);
}

// A structure that is copied whole goes in vectors, as on a device.
void on_range(void* address, u64 bytes, race::Kind kind, void const* site) {
    for (u64 at = 0; at < bytes; at += 16) {
        on_access(static_cast<char*>(address) + at, static_cast<u32>(std::min<u64>(16, bytes - at)),
                  kind, false, site);
    }
}

}  // namespace
}  // namespace lsm::emu

#define LSM_HOOK(name, bytes, kind, aligned)                                              \
    __attribute__((visibility("hidden"))) void name(void* p) {                            \
        lsm::emu::on_access(p, bytes, lsm::emu::race::Kind::kind, aligned, LSM_EMU_SITE); \
    }
#define LSM_HOOKS(bytes)                                                  \
    LSM_HOOK(__tsan_read##bytes, bytes, read, true)                       \
    LSM_HOOK(__tsan_write##bytes, bytes, write, true)                     \
    LSM_HOOK(__tsan_unaligned_read##bytes, bytes, read, false)            \
    LSM_HOOK(__tsan_unaligned_write##bytes, bytes, write, false)          \
    LSM_HOOK(__tsan_volatile_read##bytes, bytes, atomic, true)            \
    LSM_HOOK(__tsan_volatile_write##bytes, bytes, atomic, true)           \
    LSM_HOOK(__tsan_unaligned_volatile_read##bytes, bytes, atomic, false) \
    LSM_HOOK(__tsan_unaligned_volatile_write##bytes, bytes, atomic, false)

// Of host code in the same files (initialisation guards, caches of launchers).
#define LSM_ATOMIC_HOOKS(bits, T)                                                                  \
    __attribute__((visibility("hidden"))) T __tsan_atomic##bits##_load(T const volatile* p, int) { \
        return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                               \
    }                                                                                              \
    __attribute__((visibility("hidden"))) void __tsan_atomic##bits##_store(T volatile* p, T v,     \
                                                                           int) {                  \
        __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                  \
    }                                                                                              \
    __attribute__((visibility("hidden"))) T __tsan_atomic##bits##_fetch_add(T volatile* p, T v,    \
                                                                            int) {                 \
        return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                         \
    }

extern "C" {
LSM_HOOKS(1)
LSM_HOOKS(2)
LSM_HOOKS(4)
LSM_HOOKS(8)
LSM_HOOKS(16)

__attribute__((visibility("hidden"))) void __tsan_read_range(void* p, unsigned long bytes) {
    lsm::emu::on_range(p, bytes, lsm::emu::race::Kind::read, LSM_EMU_SITE);
}
__attribute__((visibility("hidden"))) void __tsan_write_range(void* p, unsigned long bytes) {
    lsm::emu::on_range(p, bytes, lsm::emu::race::Kind::write, LSM_EMU_SITE);
}
LSM_ATOMIC_HOOKS(8, unsigned char)
LSM_ATOMIC_HOOKS(32, unsigned)
LSM_ATOMIC_HOOKS(64, unsigned long)
__attribute__((visibility("hidden"))) void __tsan_vptr_update(void**, void*) {}
__attribute__((visibility("hidden"))) void __tsan_vptr_read(void**) {}
__attribute__((visibility("hidden"))) void __tsan_func_entry(void*) {}
__attribute__((visibility("hidden"))) void __tsan_func_exit() {}
__attribute__((visibility("hidden"))) void __tsan_init() {}
}

#endif
