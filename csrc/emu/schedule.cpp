// Who goes on: threads of a block by its schedule, and blocks side by side; and what it means that nobody can.
#include <bit>

#include "emu/internal.h"

namespace lsm::emu {
namespace {

constexpr u32 kPollingLimit = 200000;

u32 nth_set_bit(u32 bits, u32 n) {
    u32 at = 0;
    for (u32 half = 16; half > 0; half /= 2) {
        u32 const below = static_cast<u32>(std::popcount((bits >> at) & ((1u << half) - 1)));
        if (n >= below) n -= below, at += half;
    }
    return at;
}

std::string list_threads(std::vector<u32> const& ids) {
    std::string text;
    for (std::size_t i = 0; i < ids.size();) {
        std::size_t j = i;
        while (j + 1 < ids.size() && ids[j + 1] == ids[j] + 1) ++j;
        text += (text.empty() ? "" : ", ") + std::to_string(ids[i]);
        if (j > i) text += "-" + std::to_string(ids[j]);
        i = j + 1;
    }
    return text;
}

[[noreturn]] void report_deadlock(char const* title) {
    std::string text = title;
    std::vector<bool> told(world.thread_count);
    for (u32 i = 0; i < world.thread_count; ++i) {
        if (told[i]) continue;
        Thread const& t = world.threads[i];
        std::vector<u32> same;
        for (u32 j = i; j < world.thread_count; ++j) {
            Thread const& other = world.threads[j];
            bool const alike =
                t.finished ? other.finished
                           : !other.finished && other.waiting == t.waiting && other.site == t.site;
            if (alike && !told[j]) {
                same.push_back(j);
                told[j] = true;
            }
        }
        text += "\n  threads " + list_threads(same);
        if (t.finished) {
            text += " have exited";
        } else {
            text += std::string(t.waiting ? " wait in " : " poll in ") +
                    (t.waiting ? t.waiting : "a loop");
            if (t.site) text += " at " + describe_site(t.site);
        }
    }
    fail(text);
}

// Polling threads run again only when nobody else can.
void revive_polling() {
    static u64 seen = 0;
    static u32 rounds = 0;
    rounds = seen == world.progress ? rounds + 1 : 0;
    seen = world.progress;
    if (rounds > kPollingLimit)
        report_deadlock("livelock: every thread left polls for something nobody will do");
    for (u32 w = 0; w < world.warp_count; ++w) {
        Warp& warp = world.warps[w];
        if (warp.yielded == 0) continue;
        warp.ready |= warp.yielded;
        warp.yielded = 0;
        world.ready_warps |= 1u << w;
    }
    if (world.ready_warps == 0) report_deadlock("deadlock: no thread can go on");
}

}  // namespace

u32 random_below(u32 n) {
    return static_cast<u32>(((draw() >> 32) * n) >> 32);
}

void redraw_priorities() {
    for (u32 w = 0; w < world.warp_count; ++w)
        world.warps[w].priority = static_cast<u32>(draw() >> 33);
    world.lane_rotation = random_below(32);
}

Thread& pick() {
    if (world.ready_warps == 0) revive_polling();
    u32 w = 0, lane = 0;
    switch (world.schedule) {
        case Schedule::by_seed:
        case Schedule::in_order:
            w = static_cast<u32>(std::countr_zero(world.ready_warps));
            lane = static_cast<u32>(std::countr_zero(world.warps[w].ready));
            break;
        case Schedule::uniform: {
            u64 const r = draw();
            w = nth_set_bit(
                world.ready_warps,
                static_cast<u32>(((r >> 40) * static_cast<u32>(std::popcount(world.ready_warps))) >>
                                 24));
            u32 const ready = world.warps[w].ready;
            lane = nth_set_bit(
                ready,
                static_cast<u32>(((r & 0xffffff) * static_cast<u32>(std::popcount(ready))) >> 24));
            break;
        }
        case Schedule::run_ahead: {
            if ((draw() >> 55) == 0) redraw_priorities();
            bool found = false;
            for (u32 bits = world.ready_warps; bits != 0; bits &= bits - 1) {
                u32 const i = static_cast<u32>(std::countr_zero(bits));
                if (!found || world.warps[i].priority > world.warps[w].priority) w = i;
                found = true;
            }
            u32 const turned =
                std::rotr(world.warps[w].ready, static_cast<int>(world.lane_rotation));
            lane = (static_cast<u32>(std::countr_zero(turned)) + world.lane_rotation) & 31;
            break;
        }
    }
    return world.threads[world.warps[w].first_thread + lane];
}

bool turn_is_over() {
    if (!world.has_neighbours) return false;
    if (world.ready_warps == 0) return true;  // all that are not waiting are polling
    switch (world.schedule) {
        case Schedule::uniform:
            return draw() >> 56 == 0;
        case Schedule::run_ahead:
            return draw() >> 51 == 0;
        default:
            return world.passed_barrier;
    }
}

}  // namespace lsm::emu
