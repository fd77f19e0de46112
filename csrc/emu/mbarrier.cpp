// mbarriers. Their state is kept here; the 8 bytes in shared memory hold a mark that shows if they
// are overwritten. Bytes on their way to a barrier land when a thread waits for it, so that nothing
// reads them early by luck.
#include <algorithm>

#include "emu/internal.h"
#include "emu/race.h"

namespace lsm::emu {
namespace {

constexpr u64 kMark = 0x6d626172726965;

char* bytes_of(u32 offset, void const* site) {
    return shared_pointer(offset, 8, "mbarrier", site);
}

Mbarrier& find(u32 offset, char const* op, void const* site) {
    char const* const p = bytes_of(offset, site);
    for (Mbarrier& b : world.mbarriers) {
        if (b.offset != offset) continue;
        u64 mark;
        std::memcpy(&mark, p, 8);
        if (mark != kMark)
            fail_at(std::string(op) + ": the mbarrier's bytes were overwritten", site);
        // Unordered use of a barrier is what it is for, but not before its initialisation is known.
        if constexpr (kRace) race::access(*world.current, p, 8, race::Kind::atomic, site);
        return b;
    }
    fail_at(std::string(op) + ": there is no initialised mbarrier at shared memory + " +
                std::to_string(offset - kSharedWindow),
            site);
}

void complete_if_due(Mbarrier& b, void const* site) {
    if (b.arrivals_left < 0)
        fail_at("mbarrier: more arrivals than the " + std::to_string(b.count) + " expected", site);
    if (b.arrivals_left != 0 || b.bytes_left != 0) return;
    ++b.phase;
    b.arrivals_left = b.count;
    b.completed = std::move(b.arriving);
    b.arriving = nullptr;
    auto waiting = std::move(b.waiting);
    b.waiting.clear();
    for (Thread* t : waiting) {
        if (kRace && b.completed) race::acquire(*t, *b.completed);
        wake(*t);
    }
    ++world.progress;
}

void land(Mbarrier& b, void const* site) {
    if (b.incoming.empty() && b.attached.empty()) return;
    for (BulkCopy const& c : b.incoming) {
        if (c.source != nullptr) {
            std::memcpy(c.destination, c.source, c.bytes);
        } else {
            std::memset(c.destination, 0, c.bytes);
        }
        if constexpr (kRace) {
            race::bulk_land(c.destination, c.bytes);
            race::merge(b.arriving, c.clock);
        }
        b.bytes_left -= c.bytes;
    }
    b.incoming.clear();
    auto const attached = std::move(b.attached);
    b.attached.clear();
    for (AttachedCopies const& a : attached) {
        for (Copy const& c : a.copies) {
            if (c.source_bytes > 0) std::memcpy(c.destination, c.source, c.source_bytes);
            std::memset(c.destination + c.source_bytes, 0, c.bytes - c.source_bytes);
            if constexpr (kRace) race::bulk_land(c.destination, c.bytes);
        }
        if constexpr (kRace) race::merge(b.arriving, a.clock);
        --b.arrivals_left;
    }
    complete_if_due(b, site);
}

bool is_complete(Mbarrier const& b, u32 parity) {
    return (b.phase & 1) != (parity & 1);
}

}  // namespace

void mbarrier_init(u32 offset, u32 count) {
    void const* const site = LSM_EMU_SITE;
    char* const p = bytes_of(offset, site);
    if (count == 0 || count >= 1u << 20)
        fail_at("mbarrier.init: a count of " + std::to_string(count), site);
    if constexpr (kRace) race::access(*world.current, p, 8, race::Kind::write, site);
    std::memcpy(p, &kMark, 8);
    std::erase_if(world.mbarriers, [&](Mbarrier const& b) { return b.offset == offset; });
    Mbarrier& b = world.mbarriers.emplace_back();
    b.offset = offset;
    b.count = count;
    b.arrivals_left = count;
}

void mbarrier_invalidate(u32 offset) {
    find(offset, "mbarrier.inval", LSM_EMU_SITE);
    std::erase_if(world.mbarriers, [&](Mbarrier const& b) { return b.offset == offset; });
}

void mbarrier_arrive(u32 offset, u32 count) {
    void const* const site = LSM_EMU_SITE;
    Mbarrier& b = find(offset, "mbarrier.arrive", site);
    if constexpr (kRace) race::release(*world.current, b.arriving);
    b.arrivals_left -= count;
    complete_if_due(b, site);
}

void mbarrier_expect_tx(u32 offset, u32 bytes) {
    find(offset, "mbarrier.expect_tx", LSM_EMU_SITE).bytes_left += bytes;
}

void mbarrier_complete_tx(u32 offset, u32 bytes) {
    void const* const site = LSM_EMU_SITE;
    Mbarrier& b = find(offset, "mbarrier.complete_tx", site);
    b.bytes_left -= bytes;
    complete_if_due(b, site);
}

void mbarrier_arrive_expect_tx(u32 offset, u32 bytes) {
    void const* const site = LSM_EMU_SITE;
    Mbarrier& b = find(offset, "mbarrier.arrive.expect_tx", site);
    if constexpr (kRace) race::release(*world.current, b.arriving);
    b.bytes_left += bytes;
    --b.arrivals_left;
    complete_if_due(b, site);
}

bool mbarrier_test_parity(u32 offset, u32 parity) {
    void const* const site = LSM_EMU_SITE;
    Mbarrier& b = find(offset, "mbarrier.test_wait", site);
    if (is_complete(b, parity)) {
        if (kRace && b.completed) race::acquire(*world.current, *b.completed);
        return true;
    }
    land(b, site);
    yield();
    return false;
}

void mbarrier_wait_parity(u32 offset, u32 parity) {
    void const* const site = LSM_EMU_SITE;
    {
        Mbarrier& b = find(offset, "mbarrier.try_wait", site);
        if (!is_complete(b, parity)) land(b, site);
        if (is_complete(b, parity)) {
            if (kRace && b.completed) race::acquire(*world.current, *b.completed);
            return;
        }
        b.waiting.push_back(world.current);
    }
    wait_here("mbarrier.try_wait", site);
}

void cp_async_mbarrier_arrive(u32 offset, bool no_increment) {
    void const* const site = LSM_EMU_SITE;
    Mbarrier& b = find(offset, "cp.async.mbarrier.arrive", site);
    Thread& t = *world.current;
    if (!no_increment) ++b.arrivals_left;
    AttachedCopies a;
    a.copies.assign(t.copies.begin() + t.copies_landed, t.copies.end());
    if constexpr (kRace) race::release(t, a.clock);
    t.copies.clear();
    t.copies_landed = 0;
    t.copy_groups.clear();
    b.attached.push_back(std::move(a));
    if (!b.waiting.empty()) land(b, site);
}

void check_mbarriers_at_exit() {
    for (Mbarrier const& b : world.mbarriers) {
        if (!b.incoming.empty()) {
            fail("the block ended with a TMA load in flight, issued at " +
                 describe_site(b.incoming.front().site));
        }
        if (!b.attached.empty())
            fail("the block ended with a cp.async in flight that an mbarrier was to announce");
    }
}

// Called by the loads of tma.cpp.
void send_to_mbarrier(u32 offset, std::vector<BulkCopy>&& pieces, void const* site) {
    Mbarrier& b = find(offset, "TMA load", site);
    for (BulkCopy& piece : pieces) b.incoming.push_back(std::move(piece));
    if (!b.waiting.empty()) land(b, site);
}

}  // namespace lsm::emu
