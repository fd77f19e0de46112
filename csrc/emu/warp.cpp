// Shuffles, votes, warp reductions, ldmatrix, stmatrix, movmatrix: everything 32 lanes do together
// but multiply.
#include <algorithm>
#include <bit>

#include "emu/counters.h"
#include "emu/internal.h"
#include "emu/race.h"

namespace lsm::emu {
namespace {

template <class F>
void each_lane(u32 mask, F&& f) {
    for (; mask != 0; mask &= mask - 1) f(static_cast<u32>(std::countr_zero(mask)));
}

struct ShuffleArguments {
    Shuffle kind;
    u64 value, result;
    int operand, width;
};

void compute_shuffle(Warp& warp, Meeting& meeting) {
    each_lane(meeting.mask, [&](u32 lane) {
        auto& mine = *static_cast<ShuffleArguments*>(meeting.arguments[lane]);
        int const width = mine.width, self = static_cast<int>(lane), segment = self & ~(width - 1);
        int source = self;
        switch (mine.kind) {
            case Shuffle::index:
                source = segment + (mine.operand & (width - 1));
                break;
            case Shuffle::up:
                source = self - mine.operand < segment ? self : self - mine.operand;
                break;
            case Shuffle::down:
                source = self + mine.operand >= segment + width ? self : self + mine.operand;
                break;
            case Shuffle::exclusive_or:
                source = (self ^ mine.operand) >= segment + width ? self : self ^ mine.operand;
                break;
        }
        if ((meeting.mask >> source & 1) == 0) {
            fail_at("shuffle: lane " + std::to_string(lane) + " reads lane " +
                        std::to_string(source) + ", which is not in the mask " + hex(meeting.mask),
                    meeting.site);
        }
        mine.result = static_cast<ShuffleArguments*>(meeting.arguments[source])->value;
    });
    (void)warp;
}
constexpr WarpOp kShuffle[] = {{"__shfl_sync", compute_shuffle},
                               {"__shfl_up_sync", compute_shuffle},
                               {"__shfl_down_sync", compute_shuffle},
                               {"__shfl_xor_sync", compute_shuffle}};

struct VoteArguments {
    u64 value;
    u32 result;
};

u32 ballot(Meeting const& meeting) {
    u32 bits = 0;
    each_lane(meeting.mask, [&](u32 lane) {
        if (static_cast<VoteArguments*>(meeting.arguments[lane])->value != 0) bits |= 1u << lane;
    });
    return bits;
}

void give_all(Meeting const& meeting, u32 result) {
    each_lane(meeting.mask, [&](u32 lane) {
        static_cast<VoteArguments*>(meeting.arguments[lane])->result = result;
    });
}

constexpr WarpOp kVote[] = {
    {"__any_sync", [](Warp&, Meeting& m) { give_all(m, ballot(m) != 0); }},
    {"__all_sync", [](Warp&, Meeting& m) { give_all(m, ballot(m) == m.mask); }},
    {"__ballot_sync", [](Warp&, Meeting& m) { give_all(m, ballot(m)); }},
};

constexpr WarpOp kMatchAny = {"__match_any_sync", [](Warp&, Meeting& m) {
                                  each_lane(m.mask, [&](u32 lane) {
                                      auto& mine = *static_cast<VoteArguments*>(m.arguments[lane]);
                                      mine.result = 0;
                                      each_lane(m.mask, [&](u32 other) {
                                          auto const& its =
                                              *static_cast<VoteArguments*>(m.arguments[other]);
                                          if (its.value == mine.value) mine.result |= 1u << other;
                                      });
                                  });
                              }};

template <class T, class F>
void fold(Meeting const& m, F&& f) {
    auto value = [&](u32 lane) {
        return static_cast<T>(
            static_cast<u32>(static_cast<VoteArguments*>(m.arguments[lane])->value));
    };
    u32 const first = static_cast<u32>(std::countr_zero(m.mask));
    T total = value(first);
    each_lane(m.mask & (m.mask - 1), [&](u32 lane) { total = f(total, value(lane)); });
    give_all(m, static_cast<u32>(total));
}

constexpr WarpOp kReduceUnsigned[] = {
    {"__reduce_add_sync",
     [](Warp&, Meeting& m) { fold<u32>(m, [](u32 a, u32 b) { return a + b; }); }},
    {"__reduce_min_sync",
     [](Warp&, Meeting& m) { fold<u32>(m, [](u32 a, u32 b) { return std::min(a, b); }); }},
    {"__reduce_max_sync",
     [](Warp&, Meeting& m) { fold<u32>(m, [](u32 a, u32 b) { return std::max(a, b); }); }},
    {"__reduce_and_sync",
     [](Warp&, Meeting& m) { fold<u32>(m, [](u32 a, u32 b) { return a & b; }); }},
    {"__reduce_or_sync",
     [](Warp&, Meeting& m) { fold<u32>(m, [](u32 a, u32 b) { return a | b; }); }},
    {"__reduce_xor_sync",
     [](Warp&, Meeting& m) { fold<u32>(m, [](u32 a, u32 b) { return a ^ b; }); }},
};
constexpr WarpOp kReduceMin = {"__reduce_min_sync", [](Warp&, Meeting& m) {
                                   fold<int>(m, [](int a, int b) { return std::min(a, b); });
                               }};
constexpr WarpOp kReduceMax = {"__reduce_max_sync", [](Warp&, Meeting& m) {
                                   fold<int>(m, [](int a, int b) { return std::max(a, b); });
                               }};

constexpr WarpOp kSyncwarp = {"__syncwarp", [](Warp& warp, Meeting& m) {
                                  if constexpr (kRace) race::join_warp(warp, m.mask);
                                  (void)warp;
                                  (void)m;
                              }};

struct MatrixArguments {
    u32* registers;
    u32 offset;
};

// Lane l addresses row l % 8 of matrix l / 8; every register pair of values comes from row l / 4,
// columns 2 (l % 4). Transposed, lane l gets rows 2 (l % 4) and the next of column l / 4.
template <int Matrices, bool Transposed, bool Store>
void compute_matrix(Warp& warp, Meeting& meeting) {
    char const* const name = Store ? "stmatrix" : "ldmatrix";
    char* rows[8 * Matrices];
    u32 offsets[8 * Matrices];
    for (u32 r = 0; r < 8 * Matrices; ++r) {
        offsets[r] = static_cast<MatrixArguments*>(meeting.arguments[r])->offset;
        rows[r] = shared_pointer(offsets[r], 16, name, meeting.site);
        if constexpr (kRace) {
            race::access(world.threads[warp.first_thread + r], rows[r], 16,
                         Store ? race::Kind::write : race::Kind::read, meeting.site);
        }
    }
    count_matrix_rows(offsets, 8 * Matrices);
    for (u32 lane = 0; lane < 32; ++lane) {
        u32* const registers = static_cast<MatrixArguments*>(meeting.arguments[lane])->registers;
        for (u32 i = 0; i < Matrices; ++i) {
            char* const* const matrix = rows + 8 * i;
            u32 const major = lane / 4, minor = 2 * (lane % 4);
            u16 pair[2];
            if constexpr (Store) std::memcpy(pair, registers + i, 4);
            for (u32 e = 0; e < 2; ++e) {
                char* const element =
                    Transposed ? matrix[minor + e] + 2 * major : matrix[major] + 2 * (minor + e);
                if constexpr (Store) {
                    std::memcpy(element, &pair[e], 2);
                } else {
                    std::memcpy(&pair[e], element, 2);
                }
            }
            if constexpr (!Store) std::memcpy(registers + i, pair, 4);
        }
    }
}

constexpr WarpOp kLdmatrix[2][3] = {{{"ldmatrix.x1", compute_matrix<1, false, false>},
                                     {"ldmatrix.x2", compute_matrix<2, false, false>},
                                     {"ldmatrix.x4", compute_matrix<4, false, false>}},
                                    {{"ldmatrix.x1.trans", compute_matrix<1, true, false>},
                                     {"ldmatrix.x2.trans", compute_matrix<2, true, false>},
                                     {"ldmatrix.x4.trans", compute_matrix<4, true, false>}}};
constexpr WarpOp kStmatrix[2][3] = {{{"stmatrix.x1", compute_matrix<1, false, true>},
                                     {"stmatrix.x2", compute_matrix<2, false, true>},
                                     {"stmatrix.x4", compute_matrix<4, false, true>}},
                                    {{"stmatrix.x1.trans", compute_matrix<1, true, true>},
                                     {"stmatrix.x2.trans", compute_matrix<2, true, true>},
                                     {"stmatrix.x4.trans", compute_matrix<4, true, true>}}};

// The 8x8 matrix of 16-bit elements held two to a lane, transposed.
constexpr WarpOp kMovmatrix = {
    "movmatrix", [](Warp&, Meeting& m) {
        u16 matrix[8][8];
        for (u32 lane = 0; lane < 32; ++lane) {
            u32 const v = static_cast<u32>(static_cast<VoteArguments*>(m.arguments[lane])->value);
            matrix[lane / 4][2 * (lane % 4)] = static_cast<u16>(v);
            matrix[lane / 4][2 * (lane % 4) + 1] = static_cast<u16>(v >> 16);
        }
        for (u32 lane = 0; lane < 32; ++lane) {
            u32 const column = lane / 4, row = 2 * (lane % 4);
            static_cast<VoteArguments*>(m.arguments[lane])->result =
                matrix[row][column] | static_cast<u32>(matrix[row + 1][column]) << 16;
        }
    }};

int log2_matrices(int matrices) {
    return matrices == 1 ? 0 : matrices == 2 ? 1 : 2;
}

}  // namespace

u64 shuffle(Shuffle kind, u32 mask, u64 value, int operand, int width) {
    if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
        fail_at("shuffle: width " + std::to_string(width) + " is not a power of two up to 32",
                LSM_EMU_SITE);
    }
    ShuffleArguments arguments{kind, value, 0, operand, width};
    meet(kShuffle[static_cast<int>(kind)], mask, &arguments, LSM_EMU_SITE);
    return arguments.result;
}

u32 vote(Vote kind, u32 mask, bool predicate) {
    VoteArguments arguments{predicate, 0};
    meet(kVote[static_cast<int>(kind)], mask, &arguments, LSM_EMU_SITE);
    return arguments.result;
}

u32 match_any(u32 mask, u64 value) {
    VoteArguments arguments{value, 0};
    meet(kMatchAny, mask, &arguments, LSM_EMU_SITE);
    return arguments.result;
}

u32 warp_reduce(WarpReduce kind, bool is_signed, u32 mask, u32 value) {
    VoteArguments arguments{value, 0};
    WarpOp const& op = is_signed && kind == WarpReduce::minimum ? kReduceMin
                       : is_signed && kind == WarpReduce::maximum
                           ? kReduceMax
                           : kReduceUnsigned[static_cast<int>(kind)];
    meet(op, mask, &arguments, LSM_EMU_SITE);
    return arguments.result;
}

bool elect_one() {
    u32 const lanes = vote(Vote::ballot, ~0u, true);
    return lane() == static_cast<u32>(std::countr_zero(lanes));
}

void syncwarp(u32 mask) {
    meet(kSyncwarp, mask, nullptr, LSM_EMU_SITE);
}

void ldmatrix(u32* registers, int matrices, bool transposed, u32 offset) {
    MatrixArguments arguments{registers, offset};
    meet_full_warp(kLdmatrix[transposed][log2_matrices(matrices)], &arguments, LSM_EMU_SITE);
}

void stmatrix(u32 const* registers, int matrices, bool transposed, u32 offset) {
    MatrixArguments arguments{const_cast<u32*>(registers), offset};
    meet_full_warp(kStmatrix[transposed][log2_matrices(matrices)], &arguments, LSM_EMU_SITE);
}

u32 movmatrix(u32 value) {
    VoteArguments arguments{value, 0};
    meet_full_warp(kMovmatrix, &arguments, LSM_EMU_SITE);
    return arguments.result;
}

}  // namespace lsm::emu
