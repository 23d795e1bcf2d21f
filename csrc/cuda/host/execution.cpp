#include "execution.h"

#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <set>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "settings.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#endif

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace ffnet::host {
namespace {

constexpr size_t kStack = 256 * 1024;

// A stack and the registers that were saved on it.
class Context {
 public:
  void start_on(unsigned char* stack, void (*entry)());
  static void swap(Context& from, Context& to);

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t saved_;
#endif
};

#if defined(__x86_64__)
extern "C" void ffnet_host_swap(void** save, void* load);
asm(R"(
.text
.type ffnet_host_swap, @function
ffnet_host_swap:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size ffnet_host_swap, .-ffnet_host_swap
)");

void Context::start_on(unsigned char* stack, void (*entry)()) {
  auto** top = reinterpret_cast<void**>(stack + kStack);
  *--top = nullptr;  // keeps the stack pointer at entry where a call would have left it
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  stack_pointer_ = top;
}

void Context::swap(Context& from, Context& to) { ffnet_host_swap(&from.stack_pointer_, to.stack_pointer_); }
#else
void Context::start_on(unsigned char* stack, void (*entry)()) {
  getcontext(&saved_);
  saved_.uc_stack.ss_sp = stack, saved_.uc_stack.ss_size = kStack, saved_.uc_link = nullptr;
  makecontext(&saved_, entry, 0);
}

void Context::swap(Context& from, Context& to) { swapcontext(&from.saved_, &to.saved_); }
#endif

struct Copy {
  void* shared;
  const void* global;
  int bytes, valid_bytes, group;
};

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  int index = 0;
  const uint64_t* waits_for = nullptr;  // a counter, and the value it had when the wait began
  uint64_t seen = 0;
  bool finished = false;
  std::vector<Copy> copies;
  int copy_group = 0;
  void *tsan = nullptr, *asan = nullptr;
};

// What ThreadSanitizer is told: which threads wait for which. The scheduler's own state is shared by fibers that never
// run at once, so its accesses are not looked at.
#if defined(__SANITIZE_THREAD__)
struct Unwatched {
  Unwatched() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unwatched() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
};
void release(void* place) { __tsan_release(place); }
void acquire(void* place) { __tsan_acquire(place); }
#else
struct Unwatched {
  Unwatched() {}
};
void release(void*) {}
void acquire(void*) {}
#endif

struct Rendezvous {
  uint64_t generation = 0;
  char turns[2];  // for release and acquire: a thread that is one generation ahead must not pass on what it did since
  int arrived = 0;
  const char* site = nullptr;
  const void* inputs[kWarp];
  void* outputs[kWarp];
};

struct Machine {
  Schedule schedule = Schedule::forward;
  std::mt19937 random{0};

  const std::function<void()>* kernel = nullptr;
  Index grid{}, block{};
  int threads = 0;
  unsigned char* shared = nullptr;
  std::vector<std::unique_ptr<unsigned char[]>> stacks;
  std::vector<Fiber> fibers;
  std::vector<Rendezvous> warps;
  Rendezvous barrier;
  Fiber* current = nullptr;  // null while the scheduler runs
  std::string fault;
  Context main;
  void *main_tsan = nullptr, *main_asan = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_size = 0;
};

thread_local Machine machine;
thread_local std::set<std::string> started;  // lines of started_kernels

void land(const Copy& copy) {
  std::memcpy(copy.shared, copy.global, copy.valid_bytes);
  std::memset(static_cast<unsigned char*>(copy.shared) + copy.valid_bytes, 0, copy.bytes - copy.valid_bytes);
}

void enter(Fiber& fiber) {
  machine.current = &fiber;
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.main_asan, fiber.stack, kStack);
#endif
  Context::swap(machine.main, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.main_asan, nullptr, nullptr);
#endif
}

void leave(Fiber& fiber) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(machine.main_tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fiber.finished ? nullptr : &fiber.asan, machine.main_stack, machine.main_stack_size);
#endif
  Context::swap(fiber.context, machine.main);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.asan, &machine.main_stack, &machine.main_stack_size);
#endif
}

void fiber_entry() {
  Fiber& fiber = *machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.main_stack, &machine.main_stack_size);
#endif
  acquire(&fiber);
  (*machine.kernel)();
  if (!fiber.copies.empty()) fault("a thread ended without waiting for its asynchronous copies");
  {
    const Unwatched scheduling;
    fiber.finished = true;
  }
  release(&machine.main);
  leave(fiber);
}

// Parks the fiber until `counter` moves on.
void wait(const uint64_t& counter) {
  Fiber& fiber = *machine.current;
  fiber.waits_for = &counter, fiber.seen = counter;
  leave(fiber);
}

bool runnable(const Fiber& fiber) { return !fiber.finished && (!fiber.waits_for || *fiber.waits_for != fiber.seen); }

void synchronise(Rendezvous& meeting, int expected, bool last_acts, Compute compute) {
  const Unwatched scheduling;
  char* turn = &meeting.turns[meeting.generation % 2];
  release(turn);
  if (++meeting.arrived == expected) {
    meeting.arrived = 0;
    if (last_acts) {
      acquire(turn);
      compute(meeting.inputs, meeting.outputs);
      release(turn);
    }
    ++meeting.generation;
  } else {
    wait(meeting.generation);
  }
  acquire(turn);
}

void run_block() {
  Machine& m = machine;
  std::vector<int> order(m.threads);
  for (int i = 0; i < m.threads; ++i) order[i] = m.schedule == Schedule::reverse ? m.threads - 1 - i : i;
  for (int i = 0; i < m.threads; ++i) {
    Fiber& fiber = m.fibers[i];
    fiber.index = i, fiber.finished = false, fiber.waits_for = nullptr;
    fiber.copies.clear(), fiber.copy_group = 0;
    fiber.context.start_on(fiber.stack, fiber_entry);
#if defined(__SANITIZE_THREAD__)
    fiber.tsan = __tsan_create_fiber(0);
#endif
    release(&fiber);
  }
  m.barrier = {};
  m.warps.assign((m.threads + kWarp - 1) / kWarp, {});
  int left = m.threads;
  while (left > 0) {
    if (m.schedule == Schedule::shuffled) std::shuffle(order.begin(), order.end(), m.random);
    bool moved = false;
    for (const int i : order) {
      Fiber& fiber = m.fibers[i];
      if (!runnable(fiber)) continue;
      moved = true;
      fiber.waits_for = nullptr;
      enter(fiber);
      m.current = nullptr;
      if (!m.fault.empty()) throw std::runtime_error(m.fault);
      left -= fiber.finished;
    }
    if (!moved) fault("deadlock: a thread never reaches the barrier or collective that the others wait in");
  }
  acquire(&m.main);
#if defined(__SANITIZE_THREAD__)
  for (int i = 0; i < m.threads; ++i) __tsan_destroy_fiber(m.fibers[i].tsan);
#endif
}

}  // namespace

void select_schedule(Schedule schedule, uint32_t seed) {
  machine.schedule = schedule;
  machine.random.seed(seed);
}

int thread_index() { return machine.current->index; }
Index block_index() { return machine.block; }
Index grid_size() { return machine.grid; }
int block_threads() { return machine.threads; }
unsigned char* shared_memory() { return machine.shared; }

void sync_block() { synchronise(machine.barrier, machine.threads, false, nullptr); }

void warp_collective(const char* site, const void* input, void* output, Compute compute) {
  const Unwatched scheduling;
  const int thread = machine.current->index;
  Rendezvous& warp = machine.warps[thread / kWarp];
  if (machine.threads % kWarp) fault("a block whose threads are not whole warps");
  if (warp.arrived == 0) warp.site = site;
  if (warp.site != site && std::strcmp(warp.site, site) != 0)
    fault("the lanes of a warp meet in different collectives");
  warp.inputs[thread % kWarp] = input, warp.outputs[thread % kWarp] = output;
  synchronise(warp, kWarp, true, compute);
}

void copy_async(void* shared, const void* global, int bytes, int valid_bytes) {
  if (reinterpret_cast<uintptr_t>(shared) % bytes) fault("an asynchronous copy to a misaligned address");
  if (valid_bytes && reinterpret_cast<uintptr_t>(global) % bytes)
    fault("an asynchronous copy from a misaligned address");
  Fiber& fiber = *machine.current;
  const Copy copy{shared, global, bytes, valid_bytes, fiber.copy_group};
  if (machine.schedule == Schedule::reverse) land(copy);
  const Unwatched scheduling;
  fiber.copies.push_back(copy);
}

void commit_copies() { ++machine.current->copy_group; }

void wait_for_copies(int groups_left) {
  Fiber& fiber = *machine.current;
  const int last = fiber.copy_group - 1 - groups_left;
  size_t kept = 0;
  for (const Copy& copy : fiber.copies) {
    if (copy.group > last)
      fiber.copies[kept++] = copy;
    else if (machine.schedule != Schedule::reverse)
      land(copy);
  }
  fiber.copies.resize(kept);
}

void fault(const char* what) {
  Machine& m = machine;
  m.fault = std::string("host execution of a CUDA kernel: ") + what + ", block (" + std::to_string(m.block.x) + ", " +
            std::to_string(m.block.y) + ", " + std::to_string(m.block.z) + ")";
  if (m.current) {
    m.fault += ", thread " + std::to_string(m.current->index);
    leave(*m.current);  // for good
  }
  throw std::runtime_error(m.fault);
}

void record_start(const char* name, const void* code, int64_t blocks) {
  Dl_info library{};
  dladdr(code, &library);
  std::ostringstream line;
  line << name << '\t' << std::hex << static_cast<const char*>(code) - static_cast<const char*>(library.dli_fbase)
       << '\t' << std::dec << blocks << '\n';
  started.insert(line.str());
}

std::string started_kernels() {
  std::string lines;
  for (const std::string& line : started) lines += line;
  started.clear();
  return lines;
}

void run_grid(Index grid, int threads, size_t shared_bytes, const std::function<void()>& kernel) {
  const Unwatched scheduling;
  Machine& m = machine;
  m.grid = grid, m.threads = threads, m.kernel = &kernel, m.fault.clear(), m.current = nullptr;
  // What a block gets on the smallest GPUs: sm_75, and 8.6, 8.9 and 12.0 of those with tensor cores for all types.
  const size_t most = (settings().architecture < 80 ? 64 : 99) * size_t{1024};
  if (shared_bytes > most) fault("a block with more shared memory than some GPUs have");
  while (m.stacks.size() < static_cast<size_t>(threads)) m.stacks.emplace_back(new unsigned char[kStack]);
  m.fibers.resize(std::max(m.fibers.size(), static_cast<size_t>(threads)));
  for (int i = 0; i < threads; ++i) m.fibers[i].stack = m.stacks[i].get();
#if defined(__SANITIZE_THREAD__)
  m.main_tsan = __tsan_get_current_fiber();
#endif
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        m.block = {x, y, z};
        // Of the exact size, so that a sanitizer sees a read past its end; 128-byte aligned, as on the device.
        void* memory = nullptr;
        if (posix_memalign(&memory, 128, std::max<size_t>(shared_bytes, 1))) throw std::bad_alloc();
        const std::unique_ptr<void, void (*)(void*)> shared(memory, std::free);
        std::memset(memory, 0xff, shared_bytes);
        m.shared = static_cast<unsigned char*>(memory);
        run_block();
      }
  m.shared = nullptr;
}

}  // namespace ffnet::host
