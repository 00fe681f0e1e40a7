// Runs the threads of a kernel launch on one CPU thread. Every thread of a block is a fiber: it runs until it meets
// others (a barrier, a warp operation) or ends. Blocks run one after another.
//
// So that a missing barrier gives a wrong result here as it may on a GPU, order is drawn at random wherever CUDA
// promises none: of blocks, of threads, and of how far one warp gets ahead of another. The seed is the environment
// variable FASTFOCAL_HOST_SEED (default 0); the same seed gives the same order. Shared memory starts each block as
// garbage.

#undef _FORTIFY_SOURCE  // its longjmp refuses to change stacks

#include <cuda_runtime.h>

#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cuda_on_host {
namespace {

constexpr int kWarp = 32;
constexpr std::size_t kStackBytes = 128 * 1024;
// NaN as float, double, and (every other one) as half and bfloat16; implausible as an integer or a pointer.
constexpr std::uint32_t kGarbage = 0x7ff7f7f7u;
constexpr std::uint64_t kGarbage64 = std::uint64_t(kGarbage) << 32 | kGarbage;

class Random {  // splitmix64
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}

  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }

  template <class T>
  void shuffle(std::vector<T>& items) {
    for (std::size_t n = items.size(); n > 1; --n) {
      std::swap(items[n - 1], items[std::uint32_t(next()) * std::uint64_t(n) >> 32]);
    }
  }

 private:
  std::uint64_t state_;
};

// ---------------------------------------------------------------------------------------------------------------------
// Fibers. ucontext makes a stack and enters it; from then on _setjmp and _longjmp switch, because swapcontext makes a
// system call each time.

class Stack {
 public:
  Stack() : page_(std::size_t(sysconf(_SC_PAGESIZE))) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory_ = mmap(nullptr, page_ + kStackBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory_, page_, PROT_NONE);  // an overflow faults instead of reaching another thread's stack
  }
  ~Stack() { munmap(memory_, page_ + kStackBytes); }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  void* base() const { return static_cast<char*>(memory_) + page_; }

 private:
  std::size_t page_;
  void* memory_;
};

enum class State { ready, at_block_barrier, at_warp_operation, exited };

struct Fiber {
  State state;
  uint3 index;
  Site site;  // where it waits, and with what
  unsigned mask;
  int source;
  std::uint64_t given;
  std::uint64_t result;  // what it gets when it goes on

  bool entered = false;  // false: resume through `start`
  jmp_buf position;
  ucontext_t start;
  Stack stack;
};

struct Warp {
  unsigned alive, waiting;  // the lanes that have not ended; of these, the ones at a warp operation
};

struct Launch {
  const std::function<void()>* thread = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers;  // grows to the largest block; the first `threads` belong to this block
  std::vector<Warp> warps;
  int threads = 0;
  int alive = 0;
  int at_block_barrier = 0;
  int running = -1;  // index of the running fiber; -1 outside of kernels
  jmp_buf scheduler;
  std::exception_ptr error;
};

Launch current;
std::mutex one_launch_at_a_time;
std::atomic<cudaError_t> last_error{cudaSuccess};  // of the process: a thread_local would be filled with garbage

std::string text(uint3 i) {
  return "(" + std::to_string(i.x) + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")";
}

std::string text(const void* p) {
  std::ostringstream out;
  out << p;
  return out.str();
}

std::string place(const char* file, int line) { return std::string(file) + ":" + std::to_string(line); }

// Switches to `fiber` until it gives control back.
[[gnu::noinline]] void resume(Fiber& fiber) {
  if (_setjmp(current.scheduler) != 0) return;
  if (fiber.entered) _longjmp(fiber.position, 1);
  fiber.entered = true;
  setcontext(&fiber.start);
}

// Gives control back until the scheduler resumes this fiber.
[[gnu::noinline]] void give_back(Fiber& fiber) {
  if (_setjmp(fiber.position) == 0) _longjmp(current.scheduler, 1);
}

// Ends the launch with this error. The running fiber is abandoned where it stands, not unwound (its caller may be
// noexcept), so destructors do not run: a few strings leak.
[[noreturn]] void fail(std::string what, const char* file, int line) {
  what = "CUDA error: " + what + " (" + place(file, line);
  if (current.running < 0) {
    std::fprintf(stderr, "%s, outside of kernels)\n", what.c_str());
    std::abort();
  }
  what += ", block " + text(blockIdx) + ", thread " + text(threadIdx) + ")";
  current.error = std::make_exception_ptr(std::runtime_error(what));
  _longjmp(current.scheduler, 1);
}

// ---------------------------------------------------------------------------------------------------------------------
// Meeting

Fiber& running_fiber(const Site& site) {
  if (current.running < 0) throw std::logic_error(std::string(site.name) + " called outside of a kernel");
  return *current.fibers[current.running];
}

bool same(const Site& a, const Site& b) {
  return a.operation == b.operation && a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

// Lets the block's threads go on if all that have not ended wait at one barrier.
void release_block() {
  if (current.alive == 0 || current.at_block_barrier != current.alive) return;
  const Fiber* first = nullptr;
  int count = 0;
  for (int i = 0; i < current.threads; ++i) {
    const Fiber& fiber = *current.fibers[i];
    if (fiber.state == State::exited) continue;
    if (first == nullptr) first = &fiber;
    if (!same(fiber.site, first->site)) return;  // nobody can go on: the scheduler says so
    count += fiber.given != 0;
  }
  std::uint64_t result = 0;
  if (first->site.operation == Operation::syncthreads_or) result = count > 0;
  if (first->site.operation == Operation::syncthreads_and) result = count == current.alive;
  if (first->site.operation == Operation::syncthreads_count) result = std::uint64_t(count);
  for (int i = 0; i < current.threads; ++i) {
    Fiber& fiber = *current.fibers[i];
    if (fiber.state == State::exited) continue;
    fiber.state = State::ready;
    fiber.result = result;
  }
  current.at_block_barrier = 0;
}

// Lets the lanes that `waiting` names go on if all of them that have not ended wait at one operation.
void release_warp(int waiting) {
  const Site site = current.fibers[waiting]->site;
  const unsigned mask = current.fibers[waiting]->mask;
  const int first = waiting & -kWarp;
  Warp& warp = current.warps[waiting / kWarp];
  const unsigned group = mask & warp.alive;
  if ((group & ~warp.waiting) != 0) return;
  unsigned ballot = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((group >> lane & 1) == 0) continue;
    const Fiber& fiber = *current.fibers[first + lane];
    if (fiber.mask != mask || !same(fiber.site, site)) return;
    ballot |= unsigned(fiber.given != 0) << lane;
  }
  warp.waiting &= ~group;
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((group >> lane & 1) == 0) continue;
    Fiber& fiber = *current.fibers[first + lane];
    fiber.state = State::ready;
    if (site.operation == Operation::ballot) fiber.result = ballot;
    if (site.operation == Operation::shuffle) {
      const bool given = group >> fiber.source & 1;
      fiber.result = given ? current.fibers[first + fiber.source]->given : kGarbage64;
    }
  }
}

void fiber_main() {
  for (;;) {  // once for every block: a fiber that has ended is used again
    try {
      (*current.thread)();
    } catch (...) {
      if (!current.error) current.error = std::current_exception();
    }
    const int self = current.running;
    Warp& warp = current.warps[self / kWarp];
    current.fibers[self]->state = State::exited;
    --current.alive;
    warp.alive &= ~(1u << self % kWarp);
    release_block();
    for (int i = 0; i < kWarp; ++i) {
      if (warp.waiting >> i & 1) release_warp((self & -kWarp) + i);
    }
    give_back(*current.fibers[self]);
  }
}

std::string why_nobody_goes_on() {
  std::map<std::tuple<std::string, unsigned>, std::pair<int, int>> groups;  // (where, mask) -> how many, the first
  for (int i = 0; i < current.threads; ++i) {
    const Fiber& fiber = *current.fibers[i];
    if (fiber.state == State::exited) continue;
    const std::string where = std::string(fiber.site.name) + " in " + place(fiber.site.file, fiber.site.line);
    auto& group = groups[{where, fiber.state == State::at_warp_operation ? fiber.mask : 0}];
    if (group.first++ == 0) group.second = i;
  }
  std::ostringstream out;
  out << "CUDA error: the threads of block " << text(blockIdx) << " wait for each other forever: ";
  for (const auto& [where, group] : groups) {
    out << group.first << " of them (the first is " << group.second << ") at " << std::get<0>(where);
    if (std::get<1>(where) != 0) out << " with mask 0x" << std::hex << std::get<1>(where) << std::dec;
    out << "; ";
  }
  out << current.threads - current.alive << " have ended";
  return out.str();
}

// ---------------------------------------------------------------------------------------------------------------------
// Blocks

struct Bytes {
  void* begin = nullptr;
  std::size_t size = 0;
};

// The calling thread's copy of this library's thread_local variables: all of them are __shared__.
Bytes shared_memory() {
  static thread_local volatile char first_access_makes_them = 0;
  (void)first_access_makes_them;
  Bytes found;
  dl_iterate_phdr(
      [](dl_phdr_info* library, std::size_t, void* out) {
        const auto here = reinterpret_cast<ElfW(Addr)>(&current);
        bool ours = false;
        Bytes bytes;
        for (int i = 0; i < library->dlpi_phnum; ++i) {
          const ElfW(Phdr) & segment = library->dlpi_phdr[i];
          const ElfW(Addr) begin = library->dlpi_addr + segment.p_vaddr;
          if (segment.p_type == PT_LOAD && here >= begin && here - begin < segment.p_memsz) ours = true;
          if (segment.p_type == PT_TLS) bytes = {library->dlpi_tls_data, segment.p_memsz};
        }
        if (ours) *static_cast<Bytes*>(out) = bytes;
        return int(ours);
      },
      &found);
  return found;
}

void fill_with_garbage(Bytes bytes) {
  for (std::size_t i = 0; i < bytes.size; ++i) {
    static_cast<unsigned char*>(bytes.begin)[i] = (kGarbage >> 8 * (i % sizeof(kGarbage))) & 0xff;
  }
}

void run_block(Random random) {
  current.alive = current.threads;
  current.at_block_barrier = 0;
  current.warps.assign((current.threads + kWarp - 1) / kWarp, {});
  for (int i = 0; i < current.threads; ++i) {
    current.fibers[i]->state = State::ready;
    current.warps[i / kWarp].alive |= 1u << i % kWarp;
  }

  // In half of the blocks all threads that can go on take turns; in the others a warp runs as far as it can, then the
  // next one.
  const bool warp_by_warp = random.next() & 1;
  std::vector<int> warps(current.warps.size());
  std::iota(warps.begin(), warps.end(), 0);
  random.shuffle(warps);

  std::vector<int> round;
  while (current.alive > 0) {
    round.clear();
    for (int warp : warps) {
      for (int i = warp * kWarp; i < current.threads && i < (warp + 1) * kWarp; ++i) {
        if (current.fibers[i]->state == State::ready) round.push_back(i);
      }
      if (warp_by_warp && !round.empty()) break;
    }
    if (round.empty()) {
      current.error = std::make_exception_ptr(std::runtime_error(why_nobody_goes_on()));
      return;
    }
    random.shuffle(round);
    for (int i : round) {
      current.running = i;
      threadIdx = current.fibers[i]->index;
      resume(*current.fibers[i]);
      current.running = -1;
      if (current.error) return;
    }
  }
}

void make_fibers(dim3 block) {
  current.threads = int(block.x * block.y * block.z);
  while (current.fibers.size() < std::size_t(current.threads)) {
    auto fiber = std::make_unique<Fiber>();
    getcontext(&fiber->start);
    fiber->start.uc_stack.ss_sp = fiber->stack.base();
    // Stacks that all ended at a multiple of the page size would share a few lines of the cache.
    fiber->start.uc_stack.ss_size = kStackBytes - current.fibers.size() * 192 % 4096;
    fiber->start.uc_link = nullptr;
    makecontext(&fiber->start, fiber_main, 0);
    current.fibers.push_back(std::move(fiber));
  }
  int i = 0;
  for (unsigned z = 0; z < block.z; ++z) {
    for (unsigned y = 0; y < block.y; ++y) {
      for (unsigned x = 0; x < block.x; ++x) current.fibers[i++]->index = {x, y, z};
    }
  }
}

cudaError_t check(const cudaLaunchConfig_t& config) {
  const dim3 grid = config.gridDim, block = config.blockDim;
  const bool grid_ok = grid.x - 1 < 0x7fffffffu && grid.y - 1 < 65535 && grid.z - 1 < 65535;
  const bool block_ok = block.x - 1 < 1024 && block.y - 1 < 1024 && block.z - 1 < 64;
  if (!grid_ok || !block_ok || block.x * block.y * block.z > 1024) return cudaErrorInvalidConfiguration;
  if (config.dynamicSmemBytes != 0) return cudaErrorNotSupported;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeProgrammaticStreamSerialization) return cudaErrorNotSupported;
  }
  return cudaSuccess;
}

std::uint64_t environment(const char* name, std::uint64_t otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == 0 ? otherwise : std::strtoull(value, nullptr, 0);
}

}  // namespace

int lane() { return current.running % kWarp; }

std::uint64_t meet_block(const Site& site, bool predicate) {
  Fiber& fiber = running_fiber(site);
  fiber.state = State::at_block_barrier;
  fiber.site = site;
  fiber.given = predicate;
  ++current.at_block_barrier;
  release_block();
  give_back(fiber);
  return fiber.result;
}

std::uint64_t meet_warp(const Site& site, unsigned mask, std::uint64_t bits, int source) {
  Fiber& fiber = running_fiber(site);
  if ((mask >> lane() & 1) == 0) {
    fail(std::string(site.name) + ": the mask leaves out the calling lane", site.file, site.line);
  }
  fiber.state = State::at_warp_operation;
  fiber.site = site;
  fiber.mask = mask;
  fiber.given = bits;
  fiber.source = source;
  current.warps[current.running / kWarp].waiting |= 1u << lane();
  release_warp(current.running);
  give_back(fiber);
  return fiber.result;
}

void assertion_failed(const char* expression, const char* file, int line) {
  if (current.running < 0) throw std::logic_error(place(file, line) + ": assertion failed: " + expression);
  fail(std::string("device-side assert triggered: ") + expression, file, line);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread) {
  if (const cudaError_t error = check(config)) {
    last_error = error;
    return error;
  }
  const std::lock_guard<std::mutex> lock(one_launch_at_a_time);
  make_fibers(config.blockDim);
  current.thread = &thread;
  gridDim = config.gridDim;
  blockDim = config.blockDim;

  const std::uint64_t seed = Random(environment("FASTFOCAL_HOST_SEED", 0)).next();
  std::vector<std::uint64_t> blocks(std::uint64_t(gridDim.x) * gridDim.y * gridDim.z);
  std::iota(blocks.begin(), blocks.end(), 0);
  Random(seed).shuffle(blocks);
  const Bytes shared = shared_memory();
  for (std::uint64_t block : blocks) {
    blockIdx = {unsigned(block % gridDim.x), unsigned(block / gridDim.x % gridDim.y),
                unsigned(block / gridDim.x / gridDim.y)};
    fill_with_garbage(shared);
    run_block(Random(seed ^ (block + 1)));
    if (current.error) {
      current.fibers.clear();  // some stand in the middle of the kernel
      std::rethrow_exception(std::exchange(current.error, nullptr));
    }
  }
  return cudaSuccess;
}

}  // namespace cuda_on_host

cudaError_t cudaGetLastError() { return cuda_on_host::last_error.exchange(cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return cuda_on_host::last_error; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "unrecognized error code";
  }
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return cudaErrorInvalidValue;
  *value = int(cuda_on_host::environment("FASTFOCAL_HOST_SMS", 3));
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------------------
// What -fsanitize finds in kernels. These are the entry points that the compiler calls, in place of the sanitizer's own
// library, which would print and end the process. They catch what a CPU forgives and a GPU does not (an unaligned
// vector access), what the two do differently (a shift by the width or more), and indices outside of arrays whose size
// the compiler knows, shared ones and local ones.

namespace {

struct Where {
  const char* file;
  std::uint32_t line, column;
};

struct Type {
  std::uint16_t kind, information;
  char name[1];
};

struct PointerCheck {
  Where where;
  const Type* type;
  unsigned char log_alignment, kind;
};

struct IndexCheck {
  Where where;
  const Type* array;
  const Type* index;
};

[[noreturn]] void undefined(const Where& where, const std::string& what) {
  cuda_on_host::fail(what, where.file, int(where.line));
}

}  // namespace

extern "C" {

[[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(PointerCheck* check, void* p) {
  const std::string type = check->type->name;
  if (p == nullptr) undefined(check->where, "null pointer to " + type + " used");
  undefined(check->where, "misaligned address " + cuda_on_host::text(p) + " of type " + type +
                              ", which needs a multiple of " + std::to_string(1u << check->log_alignment));
}

[[noreturn]] void __ubsan_handle_out_of_bounds_abort(IndexCheck* check, std::uintptr_t index) {
  undefined(check->where,
            "index " + std::to_string(std::intptr_t(index)) + " outside of an array of type " + check->array->name);
}

[[noreturn]] void __ubsan_handle_add_overflow_abort(Where* where) { undefined(*where, "overflow in +"); }
[[noreturn]] void __ubsan_handle_sub_overflow_abort(Where* where) { undefined(*where, "overflow in -"); }
[[noreturn]] void __ubsan_handle_mul_overflow_abort(Where* where) { undefined(*where, "overflow in *"); }
[[noreturn]] void __ubsan_handle_negate_overflow_abort(Where* where) { undefined(*where, "overflow in unary -"); }
[[noreturn]] void __ubsan_handle_divrem_overflow_abort(Where* where) {
  undefined(*where, "division by zero, or overflow in a division");
}
[[noreturn]] void __ubsan_handle_shift_out_of_bounds_abort(Where* where) {
  undefined(*where, "shift by a negative number, or by the width or more");
}

}  // extern "C"
