// Words for reports: threads, addresses, and source lines out of the debug information by
// addr2line.
#include <dlfcn.h>
#include <elf.h>
#include <execinfo.h>
#include <unistd.h>

#include <cstdio>
#include <map>

#include "emu/counters.h"
#include "emu/internal.h"

namespace lsm::emu {
namespace {

std::vector<std::string> ask_addr2line(void const* address) {
    Dl_info info{};
    std::vector<std::string> lines;
    if (dladdr(address, &info) == 0 || info.dli_fname == nullptr) return lines;
    auto const* header = static_cast<Elf64_Ehdr const*>(info.dli_fbase);
    u64 offset = reinterpret_cast<u64>(address);
    if (header->e_type == ET_DYN) offset -= reinterpret_cast<u64>(info.dli_fbase);
    std::string file = info.dli_fname;
    if (file.find('\'') != std::string::npos) return lines;
    if (file.find('/') == std::string::npos) file = "/proc/self/exe";
    if (file == "/proc/self/exe") {
        char target[4096];
        ssize_t const n = readlink("/proc/self/exe", target, sizeof target - 1);
        if (n > 0) file.assign(target, static_cast<std::size_t>(n));
    }
    std::string const command =
        "LC_ALL=C addr2line -i -f -C -e '" + file + "' " + hex(offset) + " 2>/dev/null";
    FILE* pipe = popen(command.c_str(), "r");
    if (pipe == nullptr) return lines;
    char buffer[8192];
    while (std::fgets(buffer, sizeof buffer, pipe) != nullptr) {
        std::string line = buffer;
        while (!line.empty() && (line.back() == '\n' || line.back() == '\r')) line.pop_back();
        // "csrc/emu/../kernels/tile.cuh:3" lies in kernels/.
        for (auto up = line.find("/../"); up != std::string::npos && up > 0;
             up = line.find("/../")) {
            auto const parent = line.rfind('/', up - 1);
            if (parent == std::string::npos) break;
            line.erase(parent, up + 3 - parent);
        }
        lines.push_back(line);
    }
    pclose(pipe);
    return lines;
}

// Every inline frame of one address, innermost first, as "function" and "file:line" in turns.
std::vector<std::string> const& look_up(void const* address) {
    static std::map<void const*, std::vector<std::string>> known;
    auto const [it, is_new] = known.try_emplace(address);
    if (is_new) it->second = ask_addr2line(address);
    return it->second;
}

bool is_plumbing(std::string const& file) {
    for (char const* part : {"csrc/emu/", "kernels/platform.cuh", "kernels/matrix.cuh", "/cute/",
                             "/cutlass/", "/usr/", "/cuda", "?"}) {
        if (file.find(part) != std::string::npos) return true;
    }
    return false;
}

std::string shorten(std::string file) {
    if (auto const at = file.rfind("csrc/"); at != std::string::npos) {
        file = file.substr(at);
    } else if (auto const slash = file.rfind('/'); slash != std::string::npos) {
        file = file.substr(slash + 1);
    }
    if (auto const at = file.find(" (discriminator"); at != std::string::npos) file.resize(at);
    // The build wraps a .cu file into a .cpp that only includes it.
    if (auto const at = file.find(".cu.cpp:"); at != std::string::npos) file.erase(at + 3, 4);
    return file;
}

// "lsm::chunk::load<128>(Params const&)" -> "load"
std::string short_name(std::string name) {
    std::string const anonymous = "(anonymous namespace)::";
    for (auto at = name.find(anonymous); at != std::string::npos; at = name.find(anonymous)) {
        name.erase(at, anonymous.size());
    }
    int depth = 0;
    std::string flat;
    for (char const c : name) {
        if (c == '<') ++depth;
        if (depth == 0) flat += c;
        if (c == '>') --depth;
    }
    if (auto const at = flat.find('('); at != std::string::npos) flat.resize(at);
    if (auto const at = flat.rfind(' '); at != std::string::npos) flat = flat.substr(at + 1);
    if (auto const at = flat.rfind("::"); at != std::string::npos) flat = flat.substr(at + 2);
    return flat.empty() ? name : flat;
}

}  // namespace

std::string hex(u64 value) {
    char text[32];
    std::snprintf(text, sizeof text, "0x%llx", static_cast<unsigned long long>(value));
    return text;
}

std::string describe_thread(Thread const& t) {
    return "thread (" + std::to_string(t.index.x) + "," + std::to_string(t.index.y) + "," +
           std::to_string(t.index.z) + "), lane " + std::to_string(t.lane) + " of warp " +
           std::to_string(t.warp);
}

bool is_in_kernel(void const* site) {
    auto const& frames = look_up(static_cast<char const*>(site) - 1);
    for (std::size_t i = 1; i < frames.size(); i += 2) {
        if (!is_plumbing(frames[i])) return true;
    }
    return false;
}

void const* nearest_in_kernel(void const* site) {
    if (site != nullptr && is_in_kernel(site)) return site;
    void* callers[24];
    int const depth = backtrace(callers, 24);
    bool reached = site == nullptr;
    for (int i = 0; i < depth; ++i) {
        reached = reached || callers[i] == site;
        if (reached && is_in_kernel(callers[i])) return callers[i];
    }
    return site;
}

std::string describe_site(void const* site) {
    // A return address: the call is the instruction before it.
    auto const& frames = look_up(static_cast<char const*>(site) - 1);
    std::string text;
    int shown = 0;
    for (std::size_t i = 0; i + 1 < frames.size(); i += 2) {
        if (is_plumbing(frames[i + 1])) continue;
        if (++shown > 4) break;
        text += (shown == 1 ? "" : "\n      from ") + shorten(frames[i + 1]) + " (" +
                short_name(frames[i]) + ")";
    }
    if (text.empty() && frames.size() >= 2)
        text = shorten(frames[1]) + " (" + short_name(frames[0]) + ")";
    return text.empty() ? hex(reinterpret_cast<u64>(site)) : text;
}

std::string kernel_name(void const* function) {
    auto const& frames = look_up(function);
    bool const found = !frames.empty() && frames[0] != "??";
    return found ? short_name(frames.front()) : hex(reinterpret_cast<u64>(function));
}

}  // namespace lsm::emu
