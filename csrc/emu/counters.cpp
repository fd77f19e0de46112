// Counting. A GPU's memory system sees warp instructions, the emulator sees one lane at a time: the
// accesses of each lane are queued until the whole warp has come to one point, then matched by
// source position and occurrence.
#include "emu/counters.h"

#include <algorithm>
#include <iterator>

#include "emu/cache.h"
#include "emu/internal.h"

namespace lsm::emu {

#define LSM_FIELD(x) {#x, &Counters::x}
CounterField const kCounterFields[] = {
    LSM_FIELD(launches),
    LSM_FIELD(blocks),
    LSM_FIELD(global_read_bytes),
    LSM_FIELD(global_write_bytes),
    LSM_FIELD(global_read_sectors),
    LSM_FIELD(global_write_sectors),
    LSM_FIELD(global_reads),
    LSM_FIELD(global_writes),
    LSM_FIELD(async_bytes),
    LSM_FIELD(memory_read_bytes),
    LSM_FIELD(memory_write_bytes),
    LSM_FIELD(mma_flops),
    LSM_FIELD(mma_instructions),
    LSM_FIELD(ldmatrix),
    LSM_FIELD(ldmatrix_wavefronts),
    LSM_FIELD(ldmatrix_conflicts),
    LSM_FIELD(shared_accesses),
    LSM_FIELD(shared_wavefronts),
    LSM_FIELD(shared_conflicts),
    LSM_FIELD(atomics),
    LSM_FIELD(block_barriers),
    LSM_FIELD(warp_operations),
};
#undef LSM_FIELD
std::size_t const kCounterFieldCount = std::size(kCounterFields);

Counters counters{};

namespace {

constexpr std::size_t kMostRecords = 4096;    // of launches; older ones go
constexpr std::size_t kLongestQueue = 65536;  // accesses of one lane between two warp-wide points

std::vector<LaunchRecord> records;

bool is_shared(AccessKind kind) {
    return kind == AccessKind::shared_read || kind == AccessKind::shared_write;
}

struct LaneAccess {
    u64 address;
    u32 bytes, lane;
};

// One bank holds every 32nd word; a word read by several lanes is read once. Wide accesses go in
// parts of 128 bytes.
void count_shared(LaneAccess const* lanes, std::size_t count, u32 bytes) {
    u32 const per_part = bytes <= 4 ? 32 : 128 / bytes;
    ++counters.shared_accesses;
    std::size_t i = 0;
    for (u32 end = per_part; end <= 32; end += per_part) {
        u32 words[32][32], found[32] = {}, most = 0;
        for (; i < count && lanes[i].lane < end; ++i) {
            u32 const first = static_cast<u32>(lanes[i].address);
            for (u32 w = first / 4; w <= (first + bytes - 1) / 4; ++w) {
                u32* const bank = words[w % 32];
                u32& n = found[w % 32];
                if (std::find(bank, bank + n, w) != bank + n) continue;
                bank[n++] = w;
                most = std::max(most, n);
            }
        }
        counters.shared_wavefronts += most;
        counters.shared_conflicts += most > 1 ? most - 1 : 0;
    }
}

void count_global(LaneAccess const* lanes, std::size_t count, bool write) {
    u64 sectors[128];
    std::size_t n = 0;
    bool sorted = true;
    for (std::size_t i = 0; i < count; ++i) {
        u64 const last = (lanes[i].address + lanes[i].bytes - 1) / 32;
        for (u64 s = lanes[i].address / 32; s <= last && n < 128; ++s) {
            if (n > 0 && sectors[n - 1] == s) continue;
            sorted = sorted && (n == 0 || sectors[n - 1] < s);
            sectors[n++] = s;
        }
    }
    if (!sorted) {
        std::sort(sectors, sectors + n);
        n = static_cast<std::size_t>(std::unique(sectors, sectors + n) - sectors);
    }
    (write ? counters.global_write_sectors : counters.global_read_sectors) += n;
    ++(write ? counters.global_writes : counters.global_reads);
}

void count_instruction(Access const& example, LaneAccess const* lanes, std::size_t count) {
    AccessKind const kind = example.kind;
    if (is_shared(kind)) return count_shared(lanes, count, example.bytes);
    bool const written = kind == AccessKind::global_write;
    if (written || kind == AccessKind::global_read) count_global(lanes, count, written);
    if (!has_cache()) return;
    for (std::size_t i = 0; i < count; ++i) {
        cache_access(lanes[i].address, lanes[i].bytes, !written,
                     written || kind == AccessKind::atomic);
    }
}

// Lanes took different paths: match the k-th access of one source position with the k-th of the
// other lanes. The cache sees each instruction where the first of its lanes came to it.
void flush_diverged(Warp& warp) {
    struct Queued {
        u64 key;
        u32 occurrence, position;
        LaneAccess access;
        Access const* full;
    };
    std::vector<Queued> all;
    std::vector<std::pair<u32, std::size_t>> instructions;  // position, first in `all`
    std::vector<std::pair<u64, u32>> seen;
    for (u32 lane = 0; lane < 32 && (warp.existing >> lane & 1); ++lane) {
        seen.clear();
        u32 position = 0;
        for (Access const& a : world.threads[warp.first_thread + lane].accesses) {
            auto it = std::find_if(seen.begin(), seen.end(),
                                   [&](auto const& s) { return s.first == a.key(); });
            if (it == seen.end()) it = seen.insert(seen.end(), {a.key(), 0});
            all.push_back({a.key(), it->second++, position++, {a.address, a.bytes, lane}, &a});
        }
    }
    std::stable_sort(all.begin(), all.end(), [](Queued const& a, Queued const& b) {
        return a.key != b.key ? a.key < b.key : a.occurrence < b.occurrence;
    });
    auto const same = [](Queued const& a, Queued const& b) {
        return a.key == b.key && a.occurrence == b.occurrence;
    };
    for (std::size_t i = 0; i < all.size(); ++i) {
        if (i == 0 || !same(all[i - 1], all[i])) {
            instructions.push_back({all[i].position, i});
        } else {
            u32& first = instructions.back().first;
            first = std::min(first, all[i].position);
        }
    }
    std::sort(instructions.begin(), instructions.end());
    for (auto const& [position, first] : instructions) {
        LaneAccess lanes[32];
        std::size_t n = 0;
        for (std::size_t i = first; i < all.size() && same(all[first], all[i]); ++i)
            lanes[n++] = all[i].access;
        count_instruction(*all[first].full, lanes, n);
    }
}

bool flush_uniform(Warp& warp) {
    Thread* const threads = &world.threads[warp.first_thread];
    auto const& first = threads[0].accesses;
    u32 const lanes = static_cast<u32>(__builtin_popcount(warp.existing));
    for (u32 lane = 1; lane < lanes; ++lane) {
        auto const& other = threads[lane].accesses;
        if (other.size() != first.size()) return false;
        for (std::size_t i = 0; i < first.size(); ++i) {
            if (other[i].key() != first[i].key()) return false;
        }
    }
    for (std::size_t i = 0; i < first.size(); ++i) {
        LaneAccess together[32];
        for (u32 lane = 0; lane < lanes; ++lane) {
            Access const& a = threads[lane].accesses[i];
            together[lane] = {a.address, a.bytes, lane};
        }
        count_instruction(first[i], together, lanes);
    }
    return true;
}

}  // namespace

void reset_counters() {
    records.clear();
    empty_cache();
}

std::vector<LaunchRecord> const& launch_records() {
    return records;
}

void begin_counting() {
    counters = Counters{};
}

void end_counting(Launch const& config) {
    counters.launches = 1;
    if (records.size() >= kMostRecords)
        records.erase(records.begin(), records.begin() + kMostRecords / 2);
    records.push_back({config.kernel, config.grid, config.block, config.smem_bytes, world.seed,
                       world.schedule, counters});
}

void log_access(Thread& t, void const* address, u32 bytes, AccessKind kind, void const* site) {
    if (kind == AccessKind::global_read) counters.global_read_bytes += bytes;
    if (kind == AccessKind::global_write) counters.global_write_bytes += bytes;
    u64 const at = is_shared(kind) ? offset_of(address) : reinterpret_cast<u64>(address);
    t.accesses.push_back({at, site, static_cast<u16>(bytes), kind});
    Warp& warp = world.warps[t.warp];
    warp.has_accesses = true;
    if (t.accesses.size() >= kLongestQueue) flush_accesses(warp);
}

void flush_accesses(Warp& warp) {
    if (!flush_uniform(warp)) flush_diverged(warp);
    u32 const lanes = static_cast<u32>(__builtin_popcount(warp.existing));
    for (u32 lane = 0; lane < lanes; ++lane)
        world.threads[warp.first_thread + lane].accesses.clear();
    warp.has_accesses = false;
}

void count_matrix_rows(u32 const* offsets, int rows) {
    for (int first = 0; first < rows; first += 8) {
        // A row of 16 bytes covers four banks; equal rows are read once.
        u32 in_banks[8] = {}, most = 0;
        for (int i = 0; i < 8; ++i) {
            bool repeated = false;
            for (int j = 0; j < i; ++j) repeated |= offsets[first + j] == offsets[first + i];
            if (!repeated) most = std::max(most, ++in_banks[offsets[first + i] / 16 % 8]);
        }
        ++counters.ldmatrix;
        counters.ldmatrix_wavefronts += most;
        counters.ldmatrix_conflicts += most - 1;
    }
}

}  // namespace lsm::emu
