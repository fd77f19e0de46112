// wgmma: 128 threads multiply a 64-row tile of A by a tile of B in shared memory, at the wait and
// no sooner.
//
// Shared operands are read as CuTe's canonical layouts say (cute/atom/mma_traits_sm90_gmma.hpp), in
// units of 16 bytes: K-major, unit c of row r lies at (r % 8) w + (r / 8) SBO + c (c LBO without
// swizzle); MN-major, unit u of line k at u % w + (u / w) LBO + (k % 8) w + (k / 8) SBO, with LBO
// and SBO swapped when w = 1. Here w = 1, 2, 4, 8 units for no swizzle, 32, 64, 128 bytes; the
// address so found is then swizzled.
#include <algorithm>
#include <bit>

#include "emu/counters.h"
#include "emu/internal.h"
#include "emu/mma.h"
#include "emu/race.h"

namespace lsm::emu {
namespace {

struct Descriptor {
    u32 start, leading, stride;  // bytes
    u32 swizzle_bits;

    explicit Descriptor(u64 d)
        : start(static_cast<u32>(d & 0x3fff) << 4),
          leading(static_cast<u32>(d >> 16 & 0x3fff) << 4),
          stride(static_cast<u32>(d >> 32 & 0x3fff) << 4) {
        constexpr u32 kBits[] = {0, 3, 2, 1};  // layout_type: interleave, 128, 64, 32 bytes
        swizzle_bits = kBits[d >> 62];
    }

    // Shared offset of 16-byte unit `unit` of line `line`: lines are rows if K-major, values of k
    // if MN-major.
    u32 unit(bool mn_major, u32 line, u32 unit) const {
        u32 const w = 1u << swizzle_bits;
        u32 offset;
        if (!mn_major) {
            offset = line % 8 * w * 16 + line / 8 * stride + unit * (w == 1 ? leading : 16);
        } else if (w == 1) {
            offset = unit * stride + line % 8 * 16 + line / 8 * leading;
        } else {
            offset = unit % w * 16 + unit / w * leading + line % 8 * w * 16 + line / 8 * stride;
        }
        return swizzle(start + offset, swizzle_bits);
    }
};

template <class F>
void each_unit(Descriptor const& d, bool mn_major, u32 rows, u32 k, u32 element_bytes,
               u32 first_row, F&& f) {
    if (!mn_major) {
        for (u32 r = first_row; r < first_row + rows; ++r) {
            for (u32 c = 0; c < 2; ++c) f(d.unit(false, r, c), r, c * 16 / element_bytes);
        }
    } else {
        u32 const per = 16 / element_bytes;
        for (u32 line = 0; line < k; ++line) {
            for (u32 u = first_row / per; u < (first_row + rows) / per; ++u)
                f(d.unit(true, line, u), u * per, line);
        }
    }
}

u32 k_of(Wgmma kind) {
    return kind == Wgmma::tf32 ? 8 : kind == Wgmma::s8 ? 32 : 16;
}

// Every warp reads its 16 rows of A and all of B: one lane answers for it.
void check_reads(Warpgroup const& g, PendingWgmma const& p, bool at_issue) {
    if constexpr (!kRace) return;
    u32 const first_thread = static_cast<u32>(&g - world.warpgroups.data()) * 128;
    u32 const k = k_of(p.shape.kind), element_bytes = 32 / k;
    for (u32 warp = 0; warp < 4; ++warp) {
        Thread const& t = world.threads[first_thread + 32 * warp];
        auto read = [&](u32 offset, u32, u32) {
            char const* const address = shared_pointer(offset, 16, "wgmma operand", p.site);
            if (at_issue) {
                race::async_proxy_read(t, address, 16, p.site);
            } else {
                race::access(t, address, 16, race::Kind::read, p.site);
            }
        };
        if (!p.a_in_registers)
            each_unit(Descriptor(p.a), p.shape.a_is_mn_major, 16, k, element_bytes, 16 * warp,
                      read);
        each_unit(Descriptor(p.b), p.shape.b_is_mn_major, static_cast<u32>(p.shape.n), k,
                  element_bytes, 0, read);
    }
}

template <class Type, class Out>
void load_operand(u64 descriptor, bool mn_major, u32 rows, u32 k, void const* site, Out&& out) {
    constexpr u32 kBytes = Type::kBits / 8;
    each_unit(
        Descriptor(descriptor), mn_major, rows, k, kBytes, 0, [&](u32 offset, u32 row, u32 column) {
            char const* const p = shared_pointer(offset, 16, "wgmma operand", site);
            for (u32 e = 0; e < 16 / kBytes; ++e) {
                u32 bits = 0;
                std::memcpy(&bits, p + e * kBytes, kBytes);
                out(mn_major ? row + e : row, mn_major ? column : column + e) = Type::decode(bits);
            }
        });
}

template <class Type>
void execute(PendingWgmma const& p) {
    using Value = typename Type::Value;
    constexpr u32 kPer = 32 / Type::kBits, K = 8 * kPer;
    auto const n = static_cast<u32>(p.shape.n);
    static Value a[64][K], b[K][256], d[64][256];
    if (p.a_in_registers) {
        for (u32 t = 0; t < 128; ++t) {
            for (u32 r = 0; r < 4; ++r) {
                u32 const row = 16 * (t / 32) + t % 32 / 4 + 8 * (r % 2),
                          column = (4 * (r / 2) + t % 4) * kPer;
                u32 const bits = *p.a_registers[4 * t + r];
                for (u32 e = 0; e < kPer; ++e)
                    a[row][column + e] = Type::decode(bits >> (Type::kBits * e));
            }
        }
    } else {
        load_operand<Type>(p.a, p.shape.a_is_mn_major, 64, K, p.site,
                           [](u32 r, u32 k) -> Value& { return a[r][k]; });
    }
    load_operand<Type>(p.b, p.shape.b_is_mn_major, n, K, p.site,
                       [](u32 r, u32 k) -> Value& { return b[k][r]; });
    auto each_accumulator = [&](auto&& f) {
        for (u32 t = 0; t < 128; ++t) {
            for (u32 i = 0; i < n / 2; ++i) {
                f(*static_cast<Value*>(p.d[t * (n / 2) + i]),
                  d[16 * (t / 32) + t % 32 / 4 + 8 * (i / 2 % 2)]
                   [8 * (i / 4) + 2 * (t % 4) + i % 2]);
            }
        }
    };
    each_accumulator([&](Value& mine, Value& tile) { tile = p.accumulate ? mine : Value{0}; });
    auto const scale = static_cast<Value>(p.shape.a_scale * p.shape.b_scale);
    for (u32 r = 0; r < 64; ++r) {
        for (u32 k = 0; k < K; ++k) {
            Value const x = scale * a[r][k];
            for (u32 c = 0; c < n; ++c) d[r][c] += x * b[k][c];
        }
    }
    each_accumulator([&](Value& mine, Value& tile) { mine = tile; });
    counters.mma_flops += u64{2} * 64 * n * K;
    ++counters.mma_instructions;
}

void execute_pending(Warpgroup& g, u32 end) {
    for (u32 i = 0; i < end; ++i) {
        PendingWgmma const& p = g.pending[i];
        check_reads(g, p, false);
        switch (p.shape.kind) {
            case Wgmma::bf16:
                execute<Bf16>(p);
                break;
            case Wgmma::f16:
                execute<F16>(p);
                break;
            case Wgmma::tf32:
                execute<Tf32>(p);
                break;
            case Wgmma::s8:
                execute<Int8>(p);
                break;
        }
    }
    g.pending.erase(g.pending.begin(), g.pending.begin() + end);
    for (u32& group : g.groups) group -= std::min(group, end);
}

// Meets the other 127 threads; the last to come runs `last`.
template <class F>
void meet_warpgroup(char const* op, void* arguments, void const* site, F&& last) {
    Thread& t = *world.current;
    Warpgroup& g = world.warpgroups[t.id / 128];
    u32 const first = t.id / 128 * 128;
    if (first + 128 > world.thread_count)
        fail_at(std::string(op) + " needs a warpgroup of 128 threads", site);
    if (g.arrived != 0 && std::strcmp(g.op, op) != 0) {
        fail("divergent warpgroup: " + describe_thread(t) + " is in " + op + " at " +
             describe_site(site) + ", others are in " + g.op + " at " + describe_site(g.site));
    }
    g.op = op;
    g.site = site;
    g.arguments[t.id % 128] = arguments;
    ++counters.warp_operations;
    if (++g.arrived < 128) {
        wait_here(op, site);
        return;
    }
    g.arrived = 0;
    last(g);
    for (u32 i = first; i < first + 128; ++i) {
        if (i != t.id) wake(world.threads[i]);
    }
}

struct WgmmaArguments {
    WgmmaShape const* shape;
    void* const* d;
    u64 a, b;
    u32 const* const* a_registers;
    bool accumulate;
};

void issue(Warpgroup& g) {
    auto const& first = *static_cast<WgmmaArguments*>(g.arguments[0]);
    if (!g.fenced)
        fail_at("wgmma without wgmma.fence (warpgroup_arrive) since the last wait", g.site);
    PendingWgmma p;
    p.shape = *first.shape;
    p.a = first.a;
    p.b = first.b;
    p.accumulate = first.accumulate;
    p.a_in_registers = first.a_registers != nullptr;
    p.site = g.site;
    auto const registers = static_cast<u32>(p.shape.n) / 2;
    for (void* argument : g.arguments) {
        auto const& mine = *static_cast<WgmmaArguments*>(argument);
        if (mine.a != p.a || mine.b != p.b || mine.accumulate != p.accumulate) {
            fail_at("wgmma: the threads of a warpgroup gave different descriptors", g.site);
        }
        p.d.insert(p.d.end(), mine.d, mine.d + registers);
        if (p.a_in_registers)
            p.a_registers.insert(p.a_registers.end(), mine.a_registers, mine.a_registers + 4);
    }
    check_reads(g, p, true);
    g.pending.push_back(std::move(p));
}

}  // namespace

void wgmma(WgmmaShape const& shape, void* const* d, u64 a, u32 const* const* a_registers, u64 b,
           bool accumulate) {
    WgmmaArguments arguments{&shape, d, a, b, a_registers, accumulate};
    meet_warpgroup("wgmma", &arguments, LSM_EMU_SITE, issue);
}

void wgmma_fence() {
    meet_warpgroup("wgmma.fence", nullptr, LSM_EMU_SITE, [](Warpgroup& g) { g.fenced = true; });
}

void wgmma_commit() {
    meet_warpgroup("wgmma.commit_group", nullptr, LSM_EMU_SITE,
                   [](Warpgroup& g) { g.groups.push_back(static_cast<u32>(g.pending.size())); });
}

void wgmma_wait(u32 pending) {
    meet_warpgroup("wgmma.wait_group", nullptr, LSM_EMU_SITE, [pending](Warpgroup& g) {
        g.fenced = false;
        auto const groups = static_cast<u32>(g.groups.size());
        if (groups <= pending) return;
        u32 const end = g.groups[groups - pending - 1];
        g.groups.erase(g.groups.begin(), g.groups.end() - pending);
        execute_pending(g, end);
    });
}

void require_warpgroup_uniform(char const* what, u32 value) {
    meet_warpgroup(what, &value, LSM_EMU_SITE, [what](Warpgroup& g) {
        for (void* other : g.arguments) {
            if (*static_cast<u32*>(other) != *static_cast<u32*>(g.arguments[0])) {
                fail_at(std::string(what) + ": the threads of a warpgroup disagree", g.site);
            }
        }
    });
}

}  // namespace lsm::emu
