// torch's parallel_for on threads that ThreadSanitizer sees: those of torch's own OpenMP start and meet in code that was not
// compiled for it, where every hand-over of memory would look like a race. Loaded before torch; see ../sanitize.sh.
#include <cstdint>
#include <thread>
#include <vector>

namespace {
constexpr int64_t kThreads = 4;
}

extern "C" int32_t torch_get_num_threads(uint32_t* out) {
  *out = kThreads;
  return 0;
}

extern "C" int32_t torch_parallel_for(int64_t begin, int64_t end, int64_t grain, void (*run)(int64_t, int64_t, void*),
                                      void* context) {
  if (begin >= end) return 0;
  const int64_t pieces = grain > 0 ? (end - begin + grain - 1) / grain : end - begin;
  const int64_t threads = pieces < kThreads ? pieces : kThreads, share = (end - begin + threads - 1) / threads;
  std::vector<std::thread> running;
  for (int64_t first = begin; first < end; first += share)
    running.emplace_back(run, first, first + share < end ? first + share : end, context);
  for (std::thread& thread : running) thread.join();
  return 0;
}
