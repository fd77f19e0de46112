// Runs the cases of the other files: all, or the ones named.
#include <cstdio>
#include <cstring>

#include "harness.h"

namespace lsm::test {

std::vector<Case const*>& all_cases() {
    static std::vector<Case const*> cases;
    return cases;
}

}  // namespace lsm::test

int main(int argc, char** argv) {
    using namespace lsm::test;
    bool const list = argc == 2 && std::strcmp(argv[1], "--list") == 0;
    if (!list && lsm::emu::checks_bounds()) std::puts("bounds are checked");
    int failed = 0, run = 0;
    for (Case const* c : all_cases()) {
        bool wanted = argc == 1 || list;
        for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], c->name) == 0;
        if (!wanted) continue;
        ++run;
        if (list) {
            std::puts(c->name);
            continue;
        }
        try {
            c->run();
            std::printf("ok      %s\n", c->name);
        } catch (std::exception const& e) {
            std::printf("FAILED  %s: %s\n", c->name, e.what());
            ++failed;
        }
        std::fflush(stdout);
    }
    if (run == 0) std::puts("no such case");
    return failed != 0 || run == 0;
}
