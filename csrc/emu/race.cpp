// The race detector: vector clocks over threads, shadow cells over memory (FastTrack with two read
// slots).
//
// A cell stands for 2 bytes of shared or 4 of global memory and remembers the last write and two
// reads, each as (thread, epoch). An access is ordered after a remembered one if the accessing
// thread knows an epoch of the other at least as new. Only barriers, __syncwarp, mbarriers and
// fenced atomics make a thread know more: shuffles, votes, mma and ldmatrix do not, as on hardware.
// Blocks know nothing of each other but through fenced atomics.
#include "emu/race.h"

#include <algorithm>
#include <map>
#include <set>
#include <stdexcept>
#include <tuple>
#include <unordered_map>

#include "emu/bounds.h"
#include "emu/counters.h"

extern "C" __attribute__((weak, visibility("default"))) void* __asan_region_is_poisoned(
    void* begin, std::size_t bytes);

namespace lsm::emu {

bool checks_bounds() {
    return kRace && __asan_region_is_poisoned != nullptr;
}

namespace race {
namespace {

struct Record {
    u32 epoch = 0;
    int32_t site = 0;  // relative to this library
    u32 block = 0;
    u16 thread = 0;
    u8 mask = 0;  // bytes of the cell
    Kind kind = Kind::none;
};

enum class Content : u8 { uninitialised, set, in_flight };

struct Cell {
    Record write, reads[2];
    u32 generation = 0;
    Content content = Content::uninitialised;
};

constexpr u32 kSharedGranule = 2, kGlobalGranule = 4;
constexpr u64 kPageBytes = 4096;
constexpr std::size_t kMostReports = 4;

struct GlobalPage {
    Cell cells[kPageBytes / kGlobalGranule];
};

using Foreign =
    std::map<u32, std::shared_ptr<Clock const>>;  // block -> what is known of its threads

struct Knowledge {
    u32 now = 1;                        // own epoch
    u32 fenced_for_proxy = 0;           // newest epoch covered by fence.proxy.async
    u32 warp[32] = {};                  // of the lanes of the own warp
    std::shared_ptr<Clock const> base;  // of all threads; `warp` may be newer
    std::shared_ptr<Foreign const> foreign;
    std::shared_ptr<Foreign const> fenced;  // what the next atomic publishes
};

// Of one of the blocks that run side by side.
struct OfBlock {
    std::vector<Cell> shared_cells = std::vector<Cell>(kMaxShared / kSharedGranule);
    u32 generation = 0;
    Knowledge known[kMaxThreads];
    std::vector<std::string> reports;
    std::set<std::tuple<int32_t, int32_t, int>> reported;
};

std::vector<std::unique_ptr<OfBlock>> places;
OfBlock* own = nullptr;
std::unordered_map<u64, std::unique_ptr<GlobalPage>> pages;
u64 last_page_number = ~0ull;
GlobalPage* last_page = nullptr;
u32 block_generation = 0, launch_generation = 0;
std::unordered_map<void const*, std::shared_ptr<Foreign const>> published;

int32_t encode(void const* site) {
    return static_cast<int32_t>(static_cast<char const*>(site) -
                                reinterpret_cast<char const*>(&begin_launch));
}
void const* decode(int32_t site) {
    return reinterpret_cast<char const*>(&begin_launch) + site;
}

void raise(Clock& clock, Thread const& t) {
    Knowledge const& k = own->known[t.id];
    if (k.base != nullptr) {
        for (u32 i = 0; i < world.thread_count; ++i)
            clock.epochs[i] = std::max(clock.epochs[i], k.base->epochs[i]);
    }
    u32 const first = t.id - t.lane, lanes = std::min(32u, world.thread_count - first);
    for (u32 l = 0; l < lanes; ++l)
        clock.epochs[first + l] = std::max(clock.epochs[first + l], k.warp[l]);
    clock.epochs[t.id] = std::max(clock.epochs[t.id], k.now);
}

std::shared_ptr<Clock> empty_clock() {
    auto clock = std::make_shared<Clock>();
    clock->epochs.resize(world.thread_count);
    return clock;
}

void adopt(Thread const& t, std::shared_ptr<Clock const> const& clock) {
    Knowledge& k = own->known[t.id];
    k.base = clock;
    u32 const first = t.id - t.lane, lanes = std::min(32u, world.thread_count - first);
    for (u32 l = 0; l < lanes; ++l) k.warp[l] = std::max(k.warp[l], clock->epochs[first + l]);
}

std::shared_ptr<Foreign const> merge(std::shared_ptr<Foreign const> const& a,
                                     std::shared_ptr<Foreign const> const& b) {
    if (a == b || b == nullptr) return a;
    if (a == nullptr) return b;
    auto both = std::make_shared<Foreign>(*a);
    for (auto const& [block, clock] : *b) {
        auto& mine = (*both)[block];
        if (mine == nullptr || mine == clock) {
            mine = clock;
            continue;
        }
        auto newest = std::make_shared<Clock>(*mine);
        for (std::size_t i = 0; i < newest->epochs.size(); ++i) {
            newest->epochs[i] = std::max(newest->epochs[i], clock->epochs[i]);
        }
        mine = newest;
    }
    return both;
}

// All of `threads` learn what any of them knows about other blocks.
template <class Threads>
void share_foreign(Threads const& threads) {
    std::shared_ptr<Foreign const> all;
    for (Thread const* t : threads) all = merge(all, own->known[t->id].foreign);
    if (all == nullptr) return;
    for (Thread const* t : threads) own->known[t->id].foreign = all;
}

bool ordered(Thread const& t, Record const& before) {
    Knowledge const& k = own->known[t.id];
    if (before.block != static_cast<u32>(world.block)) {
        if (k.foreign == nullptr) return false;
        auto const it = k.foreign->find(before.block);
        return it != k.foreign->end() && it->second->epochs[before.thread] >= before.epoch;
    }
    if (before.thread == t.id) return true;
    if (before.thread / 32 == t.id / 32) return k.warp[before.thread % 32] >= before.epoch;
    return k.base != nullptr && k.base->epochs[before.thread] >= before.epoch;
}

char const* verb(Kind kind) {
    switch (kind) {
        case Kind::read:
            return "read";
        case Kind::atomic:
            return "atomic";
        case Kind::bulk:
            return "TMA write";
        default:
            return "write";
    }
}

std::string place(void const* address, bool shared) {
    return shared ? "shared memory + " + std::to_string(offset_of(address) - kSharedWindow)
                  : "global memory " + hex(reinterpret_cast<u64>(address));
}

std::string who(Record const& r) {
    std::string text = r.block == static_cast<u32>(world.block)
                           ? describe_thread(world.threads[r.thread])
                           : "thread " + std::to_string(r.thread) + " of block " +
                                 std::to_string(r.block) + " (linear)";
    return text + "\n      " + describe_site(decode(r.site));
}

void report(int kind, int32_t here, int32_t there, std::string const& text) {
    if (!own->reported.insert({here, there, kind}).second || own->reports.size() >= kMostReports)
        return;
    own->reports.push_back(text);
}

void report_race(Record const& mine, Record const& other, void const* address, bool shared) {
    if (own->reports.size() >= kMostReports || own->reported.count({mine.site, other.site, 0}) != 0)
        return;
    report(0, mine.site, other.site,
           std::string("race on ") + place(address, shared) + ": " + verb(mine.kind) + " by " +
               who(mine) + "\n    is not ordered after the " + verb(other.kind) + " by " +
               who(other));
}

Cell& shared_cell(u64 at) {
    Cell& cell = own->shared_cells[at / kSharedGranule];
    if (cell.generation != own->generation) {
        cell = Cell{};
        cell.generation = own->generation;
    }
    return cell;
}

Cell& global_cell(u64 address) {
    u64 const number = address / kPageBytes;
    if (number != last_page_number) {
        auto& page = pages[number];
        if (page == nullptr) page = std::make_unique<GlobalPage>();
        last_page = page.get();
        last_page_number = number;
    }
    Cell& cell = last_page->cells[address % kPageBytes / kGlobalGranule];
    if (cell.generation != launch_generation) {
        cell = Cell{};
        cell.generation = launch_generation;
    }
    return cell;
}

void remember_read(Thread const& t, Cell& cell, Record const& mine) {
    Record* slot = nullptr;
    for (Record& r : cell.reads) {
        if (r.kind == Kind::none || (r.thread == mine.thread && r.block == mine.block)) {
            slot = &r;
            break;
        }
    }
    for (Record& r : cell.reads) {
        if (slot == nullptr && ordered(t, r)) slot = &r;
    }
    for (Record& r : cell.reads) {
        if (slot == nullptr && r.thread / 32 == mine.thread / 32) slot = &r;
    }
    if (slot == nullptr) slot = &cell.reads[1];
    *slot = mine;
}

void check_content(Record const& mine, Cell const& cell, void const* address) {
    bool const reads = mine.kind == Kind::read || mine.kind == Kind::atomic;
    if (cell.content == Content::in_flight) {
        if (own->reported.count({mine.site, cell.write.site, 1}) != 0) return;
        report(1, mine.site, cell.write.site,
               std::string(verb(mine.kind)) + " of " + place(address, true) +
                   " while an asynchronous copy into it is in flight: by " + who(mine) +
                   "\n    the copy was issued by " + who(cell.write));
    } else if (cell.content == Content::uninitialised && reads) {
        if (own->reported.count({mine.site, 0, 2}) != 0) return;
        report(2, mine.site, 0,
               "read of uninitialised " + place(address, true) + " by " + who(mine));
    }
}

template <bool Shared>
void visit(Thread const& t, void const* address, u32 bytes, Record& mine) {
    constexpr u32 kGranule = Shared ? kSharedGranule : kGlobalGranule;
    u64 const begin = Shared ? offset_of(address) - kSharedWindow : reinterpret_cast<u64>(address),
              end = begin + bytes;
    for (u64 at = begin / kGranule * kGranule; at < end; at += kGranule) {
        u32 const low = at < begin ? static_cast<u32>(begin - at) : 0;
        u32 const high = at + kGranule > end ? static_cast<u32>(end - at) : kGranule;
        mine.mask = static_cast<u8>((1u << high) - (1u << low));
        Cell& cell = Shared ? shared_cell(at) : global_cell(at);
        void const* const here = Shared ? static_cast<void const*>(world.shared + at)
                                        : reinterpret_cast<void const*>(at);
        if constexpr (Shared) check_content(mine, cell, here);
        auto conflicts = [&](Record const& other) {
            return other.kind != Kind::none && (other.mask & mine.mask) != 0 &&
                   !(other.kind == Kind::atomic && mine.kind == Kind::atomic) && !ordered(t, other);
        };
        if (conflicts(cell.write) && cell.content != Content::in_flight) {
            report_race(mine, cell.write, here, Shared);
        }
        if (mine.kind == Kind::read) {
            remember_read(t, cell, mine);
            continue;
        }
        for (Record const& r : cell.reads) {
            if (conflicts(r)) report_race(mine, r, here, Shared);
        }
        cell.write = mine;
        cell.reads[0] = cell.reads[1] = Record{};
        cell.content = Content::set;
    }
}

Record record(Thread const& t, Kind kind, void const* site) {
    Record r;
    r.epoch = own->known[t.id].now;
    r.site = encode(site);
    r.block = static_cast<u32>(world.block);
    r.thread = static_cast<u16>(t.id);
    r.kind = kind;
    return r;
}

}  // namespace

void begin_launch() {
    ++launch_generation;
    published.clear();
    give_turn(world.resident);
    // Pages of finished launches are kept for the next one on the same tensors, up to a limit.
    if (pages.size() > 1024) {
        pages.clear();
        last_page_number = ~0ull;
    }
}

void give_turn(u32 place) {
    while (places.size() <= place) places.push_back(std::make_unique<OfBlock>());
    own = places[place].get();
}

void begin_block() {
    own->generation = ++block_generation;
    for (u32 i = 0; i < world.thread_count; ++i) own->known[i] = Knowledge{};
    own->reports.clear();
    own->reported.clear();
}

void end_block() {
    if (own->reports.empty()) return;
    std::string text = own->reports.front();
    for (std::size_t i = 1; i < own->reports.size(); ++i) text += "\n" + own->reports[i];
    throw std::runtime_error(text);
}

void join(std::vector<Thread*> const& threads) {
    auto clock = empty_clock();
    if (threads.size() == world.thread_count) {
        for (Thread const* t : threads) clock->epochs[t->id] = own->known[t->id].now;
    } else {
        for (Thread const* t : threads) raise(*clock, *t);
    }
    for (Thread const* t : threads) {
        adopt(*t, clock);
        ++own->known[t->id].now;
    }
    share_foreign(threads);
}

void join_warp(Warp const& warp, u32 mask) {
    u32 newest[32] = {};
    Knowledge* const lanes = own->known + warp.first_thread;
    bool same_base = true;
    int const first = __builtin_ctz(mask);
    for (u32 l = 0; l < 32; ++l) {
        if ((mask >> l & 1) == 0) continue;
        for (u32 i = 0; i < 32; ++i) newest[i] = std::max(newest[i], lanes[l].warp[i]);
        newest[l] = std::max(newest[l], lanes[l].now);
        same_base = same_base && lanes[l].base == lanes[first].base &&
                    lanes[l].foreign == lanes[first].foreign;
    }
    if (!same_base) {
        auto clock = empty_clock();
        std::vector<Thread*> threads;
        for (u32 l = 0; l < 32; ++l) {
            if (mask >> l & 1) threads.push_back(&world.threads[warp.first_thread + l]);
        }
        for (Thread const* t : threads) raise(*clock, *t);
        for (Thread const* t : threads) own->known[t->id].base = clock;
        share_foreign(threads);
    }
    for (u32 l = 0; l < 32; ++l) {
        if ((mask >> l & 1) == 0) continue;
        std::copy(newest, newest + 32, lanes[l].warp);
        ++lanes[l].now;
    }
}

void release(Thread const& t, std::shared_ptr<Clock>& clock) {
    if (clock == nullptr) clock = empty_clock();
    raise(*clock, t);
    ++own->known[t.id].now;
}

void acquire(Thread const& t, Clock const& clock) {
    auto both = std::make_shared<Clock>(clock);
    Knowledge const& k = own->known[t.id];
    if (k.base != nullptr) {
        for (u32 i = 0; i < world.thread_count; ++i)
            both->epochs[i] = std::max(both->epochs[i], k.base->epochs[i]);
    }
    adopt(t, both);
}

void check_bounds(void const* address, u32 bytes, Kind kind, void const* site) {
    if (!checks_bounds()) return;
    if (__asan_region_is_poisoned(const_cast<void*>(address), bytes) == nullptr) return;
    fail_at("out of bounds: " + std::string(verb(kind)) + " of " + std::to_string(bytes) +
                " bytes at " + place(address, false) + ", which no allocation holds",
            site);
}

void access(Thread const& t, void const* address, u32 bytes, Kind kind, void const* site) {
    Record mine = record(t, kind, site);
    if (in_shared(address)) {
        visit<true>(t, address, bytes, mine);
    } else {
        check_bounds(address, bytes, kind, site);
        visit<false>(t, address, bytes, mine);
    }
}

void async_proxy_read(Thread const& t, void const* address, u32 bytes, void const* site) {
    access(t, address, bytes, Kind::read, site);
    u64 const begin = offset_of(address) - kSharedWindow;
    for (u64 at = begin / kSharedGranule * kSharedGranule; at < begin + bytes;
         at += kSharedGranule) {
        Record const& w = shared_cell(at).write;
        if (w.kind != Kind::write && w.kind != Kind::atomic) continue;
        if (own->known[w.thread].fenced_for_proxy >= w.epoch) continue;
        Record const mine = record(t, Kind::read, site);
        if (own->reported.count({mine.site, w.site, 3}) != 0) continue;
        report(3, mine.site, w.site,
               "read of " + place(world.shared + at, true) +
                   " by the asynchronous proxy (wgmma, TMA) for " + who(mine) +
                   "\n    without fence.proxy.async after the write by " + who(w));
    }
}

void proxy_fence(Thread const& t) {
    own->known[t.id].fenced_for_proxy = own->known[t.id].now++;
}

void async_issue(Thread const& t, void const* address, u32 bytes, void const* site) {
    access(t, address, bytes, Kind::write, site);
    u64 const begin = offset_of(address) - kSharedWindow;
    for (u64 at = begin; at < begin + bytes; at += kSharedGranule)
        shared_cell(at).content = Content::in_flight;
}

void async_land(Thread const& t, void const* address, u32 bytes, Kind kind, void const* site) {
    Record mine = record(t, kind, site);
    mine.mask = (1u << kSharedGranule) - 1;
    u64 const begin = offset_of(address) - kSharedWindow;
    for (u64 at = begin; at < begin + bytes; at += kSharedGranule) {
        Cell& cell = shared_cell(at);
        cell.write = mine;
        cell.reads[0] = cell.reads[1] = Record{};
        cell.content = Content::set;
    }
}

void bulk_issue(Thread const& t, void const* address, u32 bytes, void const* site) {
    access(t, address, bytes, Kind::bulk, site);
    u64 const begin = offset_of(address) - kSharedWindow;
    for (u64 at = begin; at < begin + bytes; at += kSharedGranule)
        shared_cell(at).content = Content::in_flight;
}

void bulk_land(void const* address, u32 bytes) {
    u64 const begin = offset_of(address) - kSharedWindow;
    for (u64 at = begin; at < begin + bytes; at += kSharedGranule)
        shared_cell(at).content = Content::set;
}

void merge(std::shared_ptr<Clock>& into, std::shared_ptr<Clock> const& clock) {
    if (clock == nullptr) return;
    if (into == nullptr) into = empty_clock();
    for (u32 i = 0; i < world.thread_count; ++i)
        into->epochs[i] = std::max(into->epochs[i], clock->epochs[i]);
}

void global_fence(Thread const& t) {
    auto clock = empty_clock();
    raise(*clock, t);
    auto mine = std::make_shared<Foreign>();
    (*mine)[static_cast<u32>(world.block)] = clock;
    own->known[t.id].fenced = merge(mine, own->known[t.id].foreign);
    ++own->known[t.id].now;
}

void global_atomic(Thread const& t, void const* address) {
    if (in_shared(address)) return;
    Knowledge& k = own->known[t.id];
    auto& here = published[address];
    k.foreign = merge(k.foreign, here);
    here = merge(here, k.fenced);
}

}  // namespace race
}  // namespace lsm::emu
