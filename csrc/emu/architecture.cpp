#include "emu/architecture.h"

namespace lsm::emu {
namespace {
int chosen = 80;
}

void set_architecture(int number) {
    chosen = number;
}
int architecture() {
    return chosen;
}

}  // namespace lsm::emu
