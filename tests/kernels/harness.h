// Named cases in one binary: `--list` prints them, a name runs one. A case throws to fail.
#pragma once

#include <cmath>
#include <functional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "emu/bounds.h"
#include "emu/counters.h"
#include "kernels/platform.cuh"

namespace lsm::test {

#if defined(LSM_EMU_RACE)
constexpr bool kRace = true;
#else
constexpr bool kRace = false;
#endif

struct Case {
    char const* name;
    void (*run)();
    Case(char const* name, void (*run)());
};

std::vector<Case const*>& all_cases();
inline Case::Case(char const* name, void (*run)()) : name(name), run(run) {
    all_cases().push_back(this);
}

template <class... Parts>
[[noreturn]] void fail(Parts const&... parts) {
    std::ostringstream text;
    (text << ... << parts);
    throw std::logic_error(text.str());
}

template <class... Parts>
void require(bool ok, Parts const&... parts) {
    if (!ok) fail(parts...);
}

// Runs under one seed; the report if the emulator raised one, else "".
template <class F>
std::string report_of(uint64_t seed, F&& f) {
    emu::set_seed(seed);
    try {
        f();
    } catch (std::runtime_error const& e) {
        return e.what();
    }
    return "";
}

constexpr uint64_t kSeeds = 10;

// Every seed must be reported, in words that contain `expected`.
template <class F>
void expect_report(std::string const& expected, F&& f) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        std::string const report = report_of(seed, f);
        require(report.find(expected) != std::string::npos, "seed ", seed,
                ": expected a report with '", expected, "', got '", report, "'");
    }
}

// `f` returns whether the result was right. It must be wrong, or reported, under at least one seed.
template <class F>
void expect_seen(F&& f) {
    for (uint64_t seed = 0; seed < kSeeds; ++seed) {
        bool right = true;
        if (report_of(seed, [&] { right = f(); }) != "" || !right) return;
    }
    fail("the bug was not seen under any seed");
}

// `f` returns whether the result was right: it must be, silently, under 40 seeds.
template <class F>
void expect_silence(F&& f) {
    for (uint64_t seed = 0; seed < 40; ++seed) {
        bool right = false;
        std::string const report = report_of(seed, [&] { right = f(); });
        require(report.empty(), "seed ", seed, ": false alarm: ", report);
        require(right, "seed ", seed, ": wrong result");
    }
}

// A bug that values show only in some runs, and the race build in all.
template <class F>
void expect_race(std::string const& expected, F&& f) {
    if (kRace) {
        expect_report(expected, f);
    } else {
        expect_seen(f);
    }
}

// A bug that only the race build can see.
template <class F>
void expect_only_race(std::string const& expected, F&& f) {
    if (kRace) expect_report(expected, f);
}

// An access outside of all allocations, which only the race build under AddressSanitizer sees.
template <class F>
void expect_out_of_bounds(std::string const& expected, F&& f) {
    if (emu::checks_bounds()) expect_report(expected, f);
}

inline emu::Counters const& last_counters() {
    return emu::launch_records().back().counters;
}

}  // namespace lsm::test
