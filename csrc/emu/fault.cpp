// Turns a signal inside a kernel into a report: shared memory and stacks end at unmapped pages, and
// the race build is compiled to trap at a misaligned access.
#include <ucontext.h>
#include <csignal>

#include "emu/internal.h"

namespace lsm::emu {
namespace {

constexpr std::size_t kSignalStack = 64 * 1024;
char signal_stack[kSignalStack];
alignas(16) char report_stack[256 * 1024];

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL};
struct sigaction previous[3];
stack_t previous_stack;
char const* fault_address;
void const* fault_site;
int fault_signal;

[[noreturn]] void report_fault() {
    Thread const& t = *world.current;
    auto const from_shared = fault_address - world.shared;
    std::string what = "invalid access to address " + hex(reinterpret_cast<u64>(fault_address));
    auto const below_stack = t.stack_top - LSM_EMU_STACK_KIB * 1024 - fault_address;
    if (fault_signal == SIGILL) {
        what = "misaligned: an access is not aligned to its type";
    } else if (below_stack >= 0 && below_stack < 128 * 1024) {
        what = "a thread's stack is exhausted: too many local variables";
    } else if (from_shared >= -(1 << 20) && from_shared < (1 << 21)) {
        what = "out of bounds: access to shared memory + " + std::to_string(from_shared) +
               ", which has " + std::to_string(world.shared_bytes) + " bytes";
    }
    fail_at(what, static_cast<char const*>(fault_site) + 1);
}

// Runs on the signal's own stack: only redirects, so that the report is made outside the handler.
void on_fault(int signal, siginfo_t* info, void* context) {
    if (world.current == nullptr) {
        for (int i = 0; i < 3; ++i) {
            if (kSignals[i] == signal) sigaction(signal, &previous[i], nullptr);
        }
        return;
    }
    auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
    fault_signal = signal;
    fault_address = static_cast<char const*>(info->si_addr);
    fault_site = reinterpret_cast<void const*>(registers[REG_RIP]);
    registers[REG_RIP] = reinterpret_cast<greg_t>(&report_fault);
    registers[REG_RSP] = reinterpret_cast<greg_t>(report_stack + sizeof report_stack - 8);
}

}  // namespace

void install_fault_handler() {
    stack_t mine{};
    mine.ss_sp = signal_stack;
    mine.ss_size = kSignalStack;
    sigaltstack(&mine, &previous_stack);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigemptyset(&action.sa_mask);
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &previous[i]);
}

void remove_fault_handler() {
    for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &previous[i], nullptr);
    sigaltstack(&previous_stack, nullptr);
}

}  // namespace lsm::emu
