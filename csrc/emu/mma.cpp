// mma.sync on one warp. Fragment maps as in the PTX manual, the same for every element width:
// register r of A holds row l / 4 + 8 (r % 2), elements (4 (r / 2) + l % 4) per..; register r of B
// the elements (4 r + l % 4) per.. of column l / 4; the accumulator rows l / 4 and l / 4 + 8,
// columns 2 (l % 4) and the next.
#include "emu/mma.h"

#include "emu/counters.h"
#include "emu/internal.h"

namespace lsm::emu {
namespace {

struct MmaArguments {
    void* d;
    u32 const *a, *b;
};

template <class Element, int K>
void compute_mma(Warp&, Meeting& meeting) {
    using Value = typename Element::Value;
    constexpr int kPer = 32 / Element::kBits;
    Value a[16][K], b[K][8], d[16][8];
    for (int lane = 0; lane < 32; ++lane) {
        auto const& mine = *static_cast<MmaArguments*>(meeting.arguments[lane]);
        int const group = lane / 4, member = lane % 4;
        for (int r = 0; r < K / kPer / 2; ++r) {
            Value* const out = &a[group + 8 * (r % 2)][(4 * (r / 2) + member) * kPer];
            for (int e = 0; e < kPer; ++e)
                out[e] = Element::decode(mine.a[r] >> (Element::kBits * e));
        }
        for (int r = 0; r < K / kPer / 4; ++r) {
            for (int e = 0; e < kPer; ++e) {
                b[(4 * r + member) * kPer + e][group] =
                    Element::decode(mine.b[r] >> (Element::kBits * e));
            }
        }
        auto const* const c = static_cast<Value const*>(mine.d);
        for (int i = 0; i < 4; ++i) d[group + 8 * (i / 2)][2 * member + i % 2] = c[i];
    }
    for (int i = 0; i < 16; ++i) {
        Value row[8];
        for (int j = 0; j < 8; ++j) row[j] = d[i][j];
        for (int k = 0; k < K; ++k) {
            for (int j = 0; j < 8; ++j) row[j] += a[i][k] * b[k][j];
        }
        for (int j = 0; j < 8; ++j) d[i][j] = row[j];
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto* const out =
            static_cast<Value*>(static_cast<MmaArguments*>(meeting.arguments[lane])->d);
        for (int i = 0; i < 4; ++i) out[i] = d[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
    }
    counters.mma_flops += u64{2} * 16 * 8 * K;
    ++counters.mma_instructions;
}

constexpr WarpOp kMma[] = {
    {"mma.m16n8k8.bf16", compute_mma<Bf16, 8>}, {"mma.m16n8k16.bf16", compute_mma<Bf16, 16>},
    {"mma.m16n8k8.f16", compute_mma<F16, 8>},   {"mma.m16n8k16.f16", compute_mma<F16, 16>},
    {"mma.m16n8k4.tf32", compute_mma<Tf32, 4>}, {"mma.m16n8k8.tf32", compute_mma<Tf32, 8>},
    {"mma.m16n8k16.s8", compute_mma<Int8, 16>}, {"mma.m16n8k32.s8", compute_mma<Int8, 32>}};

}  // namespace

void mma(Mma kind, void* d, u32 const* a, u32 const* b) {
    MmaArguments arguments{d, a, b};
    meet_full_warp(kMma[static_cast<int>(kind)], &arguments, LSM_EMU_SITE);
}

}  // namespace lsm::emu
