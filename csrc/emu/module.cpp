// The Python module of one flavour: seeds, schedules, counters and reports. Importing it also
// registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>

#include "emu/architecture.h"
#include "emu/bounds.h"
#include "emu/cache.h"
#include "emu/counters.h"
#include "emu/emu.h"

namespace py = pybind11;
namespace emu = lsm::emu;

namespace {

emu::Schedule schedule_named(std::string const& name) {
    for (auto schedule : {emu::Schedule::by_seed, emu::Schedule::in_order, emu::Schedule::uniform,
                          emu::Schedule::run_ahead}) {
        if (name == emu::schedule_name(schedule)) return schedule;
    }
    throw py::value_error("schedule must be by_seed, in_order, uniform or run_ahead, got '" + name +
                          "'");
}

py::dict to_dict(emu::Counters const& counters) {
    py::dict d;
    for (std::size_t i = 0; i < emu::kCounterFieldCount; ++i) {
        d[emu::kCounterFields[i].name] = counters.*emu::kCounterFields[i].member;
    }
    return d;
}

py::dict read_counters() {
    emu::Counters total{};
    py::list launches;
    for (emu::LaunchRecord const& record : emu::launch_records()) {
        for (std::size_t i = 0; i < emu::kCounterFieldCount; ++i) {
            auto const member = emu::kCounterFields[i].member;
            total.*member += record.counters.*member;
        }
        py::dict d = to_dict(record.counters);
        d["kernel"] = emu::kernel_name(record.kernel);
        d["grid"] = py::make_tuple(record.grid.x, record.grid.y, record.grid.z);
        d["block"] = py::make_tuple(record.block.x, record.block.y, record.block.z);
        d["smem_bytes"] = record.smem_bytes;
        d["seed"] = record.seed;
        d["schedule"] = emu::schedule_name(record.schedule);
        launches.append(d);
    }
    py::dict all;
    all["total"] = to_dict(total);
    all["launches"] = launches;
    return all;
}

}  // namespace

PYBIND11_MODULE(LSM_EMU_MODULE, m) {
    m.doc() = "The CUDA kernels on a CPU: docs/emulator.md.";
    m.def("set_seed", &emu::set_seed, py::arg("seed"), "Seed of the following launches' schedule.");
    m.def(
        "set_schedule", [](std::string const& name) { emu::set_schedule(schedule_named(name)); },
        py::arg("schedule"),
        "by_seed (default: 0 in order, odd uniform, even run-ahead), in_order, uniform or "
        "run_ahead.");
    m.def("set_multiprocessors", &emu::set_multiprocessors, py::arg("count"),
          "What multiprocessors() tells launchers.");
    m.def("set_residents", &emu::set_residents, py::arg("count"),
          "How many blocks of a launch run side by side, at most; 1 (default): one after another.");
    m.def("set_architecture", &emu::set_architecture, py::arg("number"),
          "What architecture() tells launchers: 80, or 90 for Hopper's kernels.");
    m.def(
        "set_cache", [](std::optional<emu::u64> bytes) { emu::set_cache(bytes.value_or(0)); },
        py::arg("bytes"),
        "Size of the second-level cache behind the memory_* counters; 0 or None (default): none.");
    m.def("reset_counters", &emu::reset_counters,
          "Forget the launches counted so far, and empty the cache.");
    m.def("counters", &read_counters,
          "{'total': {name: count}, 'launches': [one dict per launch, in order]}.");
    m.def("checks_bounds", &emu::checks_bounds,
          "Whether accesses outside of every allocation are reported.");
    m.def("last_report", &emu::last_report, "Report of the last launch that failed, or ''.");
}
