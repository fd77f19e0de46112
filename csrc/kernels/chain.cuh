// Blocks of one launch that wait for what others have left in global memory.
//
// A block takes its place when it begins, so whoever has a lower place is running or done, in whatever order the card
// starts blocks: waiting for lower places comes to an end. What a block waits for, and the order in which it adds that up,
// depend on places alone, so results repeat to the last bit.
#pragma once

#include "kernels/carver.h"
#include "kernels/fill.cuh"

namespace lsm {

struct Chain {
    u32* tickets = nullptr;  // [rounds]: how many blocks have begun
    u32* flags = nullptr;    // [places]: rounds done with it; null: blocks are on their own
    i64 rounds = 0, places = 0;

    Chain() = default;
    Chain(Carver& carver, i64 places, i64 rounds = 1) : rounds(rounds), places(places) {
        tickets = carver.take<u32>(rounds + places);
        flags = tickets + rounds;
    }
    void reset(void* stream) const { fill(tickets, rounds + places, u32{0}, stream); }

    LSM_DEVICE bool exists() const { return flags != nullptr; }
    // Of all threads; `shared` is a word that nobody uses meanwhile.
    LSM_DEVICE unsigned take_place(u32* shared, int round = 0) const {
        if (!exists()) return blockIdx.x;
        if (threadIdx.x == 0) *shared = atomicAdd(tickets + round, 1u);
        __syncthreads();
        unsigned const place = *shared;
        __syncthreads();
        return place;
    }
    // By one thread, after a barrier with those whose stores it speaks for.
    LSM_DEVICE void raise(i64 place, int round = 0) const {
        __threadfence();
        atomicExch(flags + place, static_cast<u32>(round + 1));
    }
    // By one thread, before a barrier with those who read what was stored.
    LSM_DEVICE void await(i64 place, int round = 0) const {
        u32 const volatile& flag = flags[place];
        while (flag <= static_cast<u32>(round)) __nanosleep(20);
        __threadfence();
    }
};

}  // namespace lsm
