// What GPU the emulator says it is. It runs every kernel whatever it says; launchers choose by it.
#pragma once

namespace lsm::emu {

void set_architecture(int number);  // 80, as long as nobody sets it
int architecture();

}  // namespace lsm::emu
