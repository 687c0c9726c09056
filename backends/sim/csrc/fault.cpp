// Memory faults: a host that touches device memory is reported (or counted), a device task that leaves its allocation
// becomes an error that surfaces late.
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <stdexcept>

#include "device.h"

namespace sim {
namespace {

thread_local sigjmp_buf back;
thread_local volatile sig_atomic_t armed = 0;
thread_local void* volatile fault_address = nullptr;
std::atomic<HostTouch> mode{HostTouch::Abort};
std::atomic<long> touches{0};
struct sigaction before[2];

int slot_of(int signal) { return signal == SIGBUS; }

void report(const std::string& text) {
  auto written = write(STDERR_FILENO, text.data(), text.size());
  (void)written;
}

void on_fault(int signal, siginfo_t* info, void*) {
  for (int i = 0; i < device_count(); i++) {
    auto& memory = device(i).memory;
    int kind = memory.classify(info->si_addr);
    if (kind == 0) continue;
    if (kind == 2 && armed) {
      fault_address = info->si_addr;
      siglongjmp(back, 1);
    }
    if (kind == 2)
      report("\nktcore_sim: a kernel written in Python left its allocation (" + memory.describe(info->si_addr) + ").\n");
    if (kind == 1) {
      touches++;
      if (mode == HostTouch::Count && memory.open_page(info->si_addr)) return;
      report("\nktcore_sim: the host touched device memory (" + memory.describe(info->si_addr) +
             "). Copy it to the host first; only work on a stream of the device may use it.\n");
    }
    break;
  }
  // not ours, or reported: whoever was here before (a traceback printer, or the default) has the last word
  sigaction(signal, &before[slot_of(signal)], nullptr);
}

}  // namespace

void run_guarded(const Task& task) {
  // Objects of the interrupted task are leaked; a real device would be lost altogether.
  if (sigsetjmp(back, 0) == 0) {
    armed = 1;
    try {
      task.run();
    } catch (...) {
      armed = 0;
      throw;
    }
    armed = 0;
    return;
  }
  armed = 0;
  std::string where;
  for (int i = 0; i < device_count(); i++)
    if (device(i).memory.classify(fault_address)) where = device(i).memory.describe(fault_address);
  throw std::runtime_error("illegal memory access: " + where);
}

void disarm_fault_handler() { armed = 0; }

void install_fault_handler() {
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  sigaction(SIGSEGV, &action, &before[0]);
  sigaction(SIGBUS, &action, &before[1]);
}

void set_host_touch(HostTouch wanted) { mode = wanted; }
long host_touches() { return touches; }

}  // namespace sim
