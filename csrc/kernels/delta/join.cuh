// Makes of what pieces leave from zero what every piece starts from, in the order of time or
// against it (cuts.cuh):
//
//     S <- M S + N        dS <- M^T dS + N'
//
// in fp32. A block has kColumns columns of a head's state and walks the pieces of a sequence in the
// window; N and N' are replaced. Grid: (record, head, columns); blocks where a walk starts.
#pragma once

#include "kernels/delta/chunks.cuh"

namespace lsm::delta {

template <bool Reverse>
struct Join {
    static constexpr int kThreads = 256, kColumns = 16, kMaxK = 128;
    static constexpr int kRows = kMaxK * kColumns / kThreads;  // of a thread, all of one column
    static constexpr int kSlice = 32, kPitch = kMaxK + 4;
    static constexpr int kFetched = kSlice * kMaxK / kThreads;  // elements of a slice per thread

    struct SharedStorage {
        float state[kMaxK][kColumns];
        alignas(16) float slice[kSlice][kPitch];  // M: of kSlice factors, all rows
    };

    DeltaWork const& work;
    DeltaParams const& p;
    SharedStorage& s;
    int const head, column0, column, row0;

    LSM_DEVICE bool exists() const { return column0 + column < p.V; }
    LSM_DEVICE i64 at(int k) const { return k * p.V + column0 + column; }

    LSM_DEVICE float* of(Segment const& segment) const {
        return Reverse ? work.cuts.grad(segment.batch, segment.t0, head)
                       : work.cuts.state(segment.batch, segment.t1, head);
    }

    LSM_DEVICE static bool starts(Cuts const& cuts, Segment const& segment) {
        if (segment.unused() || segment.poison) return false;
        return Reverse ? cuts.leads_back(segment) && !cuts.leads(segment)
                       : cuts.leads(segment) && !cuts.leads_back(segment);
    }
    // Whether the walk goes through this piece to another one; forwards, or to the next window.
    LSM_DEVICE bool passes(Segment const& segment) const {
        return Reverse ? !work.cuts.leads(segment) : !segment.is_last && !work.cuts.leads(segment);
    }

    // Row and factor of element i of a slice; neighbours read neighbours.
    LSM_DEVICE static int factor(int i) { return Reverse ? i / kMaxK : i % kSlice; }
    LSM_DEVICE static int row(int i) { return Reverse ? i % kMaxK : i / kSlice; }

    LSM_DEVICE void fetch_slice(float const* M, int from, float (&m)[kFetched]) const {
        LSM_UNROLL
        for (int n = 0; n < kFetched; ++n) {
            int const i = threadIdx.x + n * kThreads, j = from + factor(i), k = row(i);
            bool const valid = j < p.K && k < p.K;
            m[n] = valid ? load_global(M + (Reverse ? j * p.K + k : k * p.K + j)) : 0.f;
        }
    }

    // x += M times the state.
    LSM_DEVICE void apply(float const* M, float (&x)[kRows]) {
        float next[kFetched];
        fetch_slice(M, 0, next);
        LSM_UNROLL_BY(1)
        for (int from = 0; from < p.K; from += kSlice) {
            __syncthreads();  // the state is complete, the slice before this one is used
            LSM_UNROLL
            for (int n = 0; n < kFetched; ++n) {
                int const i = threadIdx.x + n * kThreads;
                s.slice[factor(i)][row(i)] = next[n];
            }
            __syncthreads();
            fetch_slice(M, from + kSlice, next);
            LSM_UNROLL_BY(4)
            for (int j = 0; j < kSlice; ++j) {
                float const by = s.state[from + j][column];
                float4 const a = *reinterpret_cast<float4 const*>(&s.slice[j][row0]),
                             b = *reinterpret_cast<float4 const*>(&s.slice[j][row0 + 4]);
                x[0] += a.x * by, x[1] += a.y * by, x[2] += a.z * by, x[3] += a.w * by;
                x[4] += b.x * by, x[5] += b.y * by, x[6] += b.z * by, x[7] += b.w * by;
            }
        }
        __syncthreads();  // the state may be replaced
    }

    LSM_DEVICE void load(float const* from, float (&x)[kRows]) const {
        LSM_UNROLL
        for (int i = 0; i < kRows; ++i) {
            bool const valid = exists() && row0 + i < p.K;
            x[i] = valid ? load_global(from + at(row0 + i)) : 0.f;
        }
    }

    LSM_DEVICE void store(float const (&x)[kRows], float* to) const {
        LSM_UNROLL
        for (int i = 0; i < kRows; ++i) {
            if (exists() && row0 + i < p.K) store_global(to + at(row0 + i), x[i]);
        }
    }

    LSM_DEVICE void run(i64 record, Segment segment) {
        float x[kRows];
        load(of(segment), x);
        while (true) {
            record += Reverse ? -1 : 1;
            segment = work.segments[record];
            if (!passes(segment)) return;
            LSM_UNROLL
            for (int i = 0; i < kRows; ++i) s.state[row0 + i][column] = x[i];
            load(of(segment), x);
            apply(work.cuts.transfer(segment.batch, segment.t0, head), x);
            store(x, of(segment));
        }
    }
};

template <bool Reverse>
__global__ void __launch_bounds__(256) join(DeltaWork const work) {
    using Kernel = Join<Reverse>;
    int const tiles = static_cast<int>((work.p.V + Kernel::kColumns - 1) / Kernel::kColumns);
    i64 const unit = blockIdx.x / tiles;
    i64 const record = work.record_of(unit / work.p.HV);
    if (record < 0) return;
    Segment const segment = work.segments[record];
    if (!Kernel::starts(work.cuts, segment)) return;
    auto& shared = *reinterpret_cast<typename Kernel::SharedStorage*>(dyn_smem());
    int const tid = threadIdx.x;
    Kernel{work,
           work.p,
           shared,
           static_cast<int>(unit % work.p.HV),
           static_cast<int>(blockIdx.x % tiles) * Kernel::kColumns,
           tid % Kernel::kColumns,
           tid / Kernel::kColumns * Kernel::kRows}
        .run(record, segment);
}

}  // namespace lsm::delta
