// Fully associative and least recently used first, so that what is counted does not depend on where
// the host puts a tensor, as the sets of an index would; lines of 64 bytes for the same reason:
// torch aligns tensors to no more. Bytes are remembered, as on a GPU: a sector that is written
// needs no read, not even in parts, before somebody reads a byte of it that nobody wrote.
#include "emu/cache.h"

#include <algorithm>
#include <bit>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu/counters.h"
#include "emu/internal.h"

namespace lsm::emu {
namespace {

constexpr u64 kMostBuckets = 1 << 20;

struct Line {
    u64 number;              // address / kCacheLine
    u64 present;             // bytes
    bool dirty[2];           // sectors
    u32 newer, older;        // ring in order of use
    u32 next_in_bucket = 0;  // 0 ends it
};

u64 capacity = 0;         // lines
std::vector<Line> lines;  // 0 is none: it is where the ring begins
std::vector<u32> buckets;

u32& bucket_of(u64 number) {
    return buckets[(number * 0x9e3779b97f4a7c15ull >> 40) & (buckets.size() - 1)];
}

void unlink(u32 i) {
    lines[lines[i].newer].older = lines[i].older;
    lines[lines[i].older].newer = lines[i].newer;
}

void make_newest(u32 i) {
    lines[i].newer = 0;
    lines[i].older = lines[0].older;
    lines[lines[0].older].newer = i;
    lines[0].older = i;
}

u32 take_unused() {
    if (lines.size() <= capacity) {
        lines.emplace_back();
        return static_cast<u32>(lines.size() - 1);
    }
    u32 const oldest = lines[0].newer;
    unlink(oldest);
    u32* link = &bucket_of(lines[oldest].number);
    while (*link != oldest) link = &lines[*link].next_in_bucket;
    *link = lines[oldest].next_in_bucket;
    return oldest;
}

Line& use(u64 number) {
    u32 const newest = lines[0].older;
    if (newest != 0 && lines[newest].number == number) return lines[newest];
    u32& bucket = bucket_of(number);
    u32 i = bucket;
    while (i != 0 && lines[i].number != number) i = lines[i].next_in_bucket;
    if (i != 0) {
        unlink(i);
    } else {
        i = take_unused();
        lines[i] = Line{number, 0, {}, 0, 0, bucket};
        bucket = i;
    }
    make_newest(i);
    return lines[i];
}

}  // namespace

void set_cache(u64 bytes) {
    if (bytes > 0 && bytes < kCacheLine) {
        throw std::invalid_argument("a cache has at least one line of " +
                                    std::to_string(kCacheLine) + " bytes, got " +
                                    std::to_string(bytes));
    }
    capacity = bytes / kCacheLine;
    empty_cache();
}

void empty_cache() {
    lines.assign(1, Line{});
    buckets.assign(std::bit_ceil(std::min(capacity, kMostBuckets)), 0);
}

bool has_cache() {
    return capacity > 0;
}

void cache_access(u64 address, u64 bytes, bool reads, bool writes) {
    if (!has_cache()) return;
    for (u64 const end = address + bytes; address < end;) {
        u64 const first = address % kCacheLine, n = std::min(end - address, kCacheLine - first);
        u64 const touched = (~u64{0} >> (kCacheLine - n)) << first;
        Line& line = use(address / kCacheLine);
        for (u32 s = 0; s < 2; ++s) {
            u64 const sector = u64{0xffffffff} << 32 * s, here = touched & sector;
            if (here == 0) continue;
            if (reads && (here & ~line.present) != 0) {
                counters.memory_read_bytes += 32;
                line.present |= sector;
            }
            if (writes) {
                counters.memory_write_bytes += line.dirty[s] ? 0 : 32;
                line.dirty[s] = true;
                line.present |= here;
            }
        }
        address += n;
    }
}

void note_prefetch(void const* address) {
    if (!has_cache() || world.current == nullptr) return;
    log_access(*world.current, address, 1, AccessKind::prefetch, LSM_EMU_SITE);
}

}  // namespace lsm::emu
