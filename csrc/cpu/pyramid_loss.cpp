// The operator pyramid_loss on the CPU: one parallel region over the tiles of all levels, on torch's own threads.
#include <sys/mman.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "device.h"
#include "isa.h"

namespace fastfocal {
namespace {

struct Isa {
  const char* name;
  RunTiles run_tiles;
  PackChunk pack_chunk;
};

Isa choose_isa() {
#if defined(__x86_64__)
  const char* limit = std::getenv("FASTFOCAL_CPU_CAPABILITY");
  const bool portable_only = limit != nullptr && std::strcmp(limit, "default") == 0;
  const bool no_avx512 = limit != nullptr && std::strcmp(limit, "AVX2") == 0;
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  if (avx512 && !no_avx512 && !portable_only) return {"AVX512", avx512::run_tiles, avx512::pack_chunk};
  if (avx2 && !portable_only) return {"AVX2", avx2::run_tiles, avx2::pack_chunk};
#endif
  return {"default", portable::run_tiles, portable::pack_chunk};
}

const Isa& isa() {
  static const Isa chosen = choose_isa();
  return chosen;
}

// Fewer logits than these tiles hold are not worth waking a second thread for (about 10 microseconds of work).
constexpr int64_t kTilesPerThread = 4;

struct Range {
  uint32_t begin, end;
};

// A thread's share of the tiles. Its owner takes from the front, and a thread that is done with its own from the back: each
// goes through contiguous memory, and none waits for one that was slower (threads meet different numbers of page faults,
// cores differ, other processes run on them).
class Share {
 public:
  void set(Range tiles) { tiles_.store(tiles, std::memory_order_relaxed); }

  // Some of the tiles; none when none are left.
  Range take(bool from_front) {
    Range now = tiles_.load(std::memory_order_relaxed), taken, rest;
    do {
      const uint32_t n = std::min<uint32_t>(now.end - now.begin, kTilesPerThread);
      taken = from_front ? Range{now.begin, now.begin + n} : Range{now.end - n, now.end};
      rest = from_front ? Range{taken.end, now.end} : Range{now.begin, taken.begin};
    } while (!tiles_.compare_exchange_weak(now, rest, std::memory_order_relaxed));
    return taken;
  }

 private:
  alignas(64) std::atomic<Range> tiles_;  // a cache line for each
};

}  // namespace

const char* cpu_capability() { return isa().name; }
PackChunk chunk_packer() { return isa().pack_chunk; }

// The first write to a page costs more than the arithmetic on it: a page of 2 MiB is one fault where there were 512.
void Cpu::fresh(void* memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) & ~(kPage - 1);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + bytes) & ~(kPage - 1);
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may fail
#else
  (void)memory;
  (void)bytes;
#endif
}

void Cpu::run(const KernelParams& params, const Tensor&) {
  const RunTiles run_tiles = isa().run_tiles;
  const int64_t tiles = params.levels.tiles;
  int64_t logits = 0;  // small levels have a tile each
  for (int l = 0; l < params.levels.count; ++l) logits += params.levels.images * params.levels.level[l].image_logits;
  constexpr int64_t kWorthwhile = kTilesPerThread * kTileLogits;
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), (logits + kWorthwhile - 1) / kWorthwhile);
  if (threads <= 1) return run_tiles(params, 0, tiles);
  STD_TORCH_CHECK(tiles <= UINT32_MAX, "logits: more than 2^45 of them");
  std::vector<Share> shares(static_cast<size_t>(threads));
  for (int64_t i = 0; i < threads; ++i)
    shares[static_cast<size_t>(i)].set(
        {static_cast<uint32_t>(tiles * i / threads), static_cast<uint32_t>(tiles * (i + 1) / threads)});
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) {
    for (int64_t own = first; own < last; ++own) {
      for (int64_t i = 0; i < threads; ++i) {
        Share& share = shares[static_cast<size_t>((own + i) % threads)];
        for (;;) {
          const Range range = share.take(i == 0);
          if (range.begin == range.end) break;
          run_tiles(params, range.begin, range.end);
        }
      }
    }
  });
}

namespace {

template <class S>
void add_partials(const KernelParams& params, S* loss, int64_t size, bool add) {
  std::vector<double> sums(static_cast<size_t>(size), 0.0);
  for (int l = 0; l < params.levels.count; ++l) {
    const Level& level = params.levels.level[l];
    int64_t tile = level.tiles.first;
    for (int64_t image = 0; image < params.levels.images; ++image) {
      double sum = 0;
      for (int64_t i = 0; i < level.tiles.per_image; ++i) sum += params.partial[tile++];
      const int64_t at = params.reduction == Reduction::kLevel   ? params.first_level + l
                         : params.reduction == Reduction::kImage ? image
                                                                 : 0;
      sums[static_cast<size_t>(at)] += sum;
    }
  }
  for (int64_t i = 0; i < size; ++i) {
    const double before = add ? double(loss[i]) : 0.0;
    loss[i] = S(before + sums[static_cast<size_t>(i)]);
  }
}

}  // namespace

void Cpu::reduce(const KernelParams& params, void* loss, int64_t size, bool add, const Tensor&) {
  with_dtype(params.dtype, [&](auto logit) {
    add_partials(params, static_cast<Accumulation<type_of<decltype(logit)>>*>(loss), size, add);
  });
}

}  // namespace fastfocal
