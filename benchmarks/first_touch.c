// Time of the first write to fresh memory, in huge and in small pages, with one thread and with two; and of unmapping it.
//   cc -O2 -fopenmp benchmarks/first_touch.c -o first_touch && ./first_touch
#define _GNU_SOURCE
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>

enum { kRepeats = 5 };
static const size_t kHuge = (size_t)2 << 20, kSmall = 4096;

static void measure(size_t bytes, size_t page, int threads) {
  char* mapped = mmap(NULL, bytes + kHuge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return;
  volatile char* begin = (char*)(((uintptr_t)mapped + kHuge - 1) & ~(uintptr_t)(kHuge - 1));
  if (page == kHuge) madvise((void*)begin, bytes, MADV_HUGEPAGE);
  double start = omp_get_wtime();
#pragma omp parallel for schedule(static) num_threads(threads)
  for (size_t i = 0; i < bytes; i += page) begin[i] = 1;
  const double touched = omp_get_wtime() - start;
  start = omp_get_wtime();
  munmap(mapped, bytes + kHuge);
  printf("%3zu MiB in pages of %4zu KiB, threads %d: %.2f ms (%.2f us a page), unmapped in %.2f ms\n", bytes >> 20,
         page >> 10, threads, 1e3 * touched, 1e6 * touched * (double)page / (double)bytes, 1e3 * (omp_get_wtime() - start));
}

int main(void) {
#pragma omp parallel num_threads(2)
  {
  }  // both threads are there
  for (int i = 0; i < kRepeats; ++i) {
    for (int threads = 1; threads <= 2; ++threads) {
      measure((size_t)120 << 20, kHuge, threads);
      measure((size_t)8 << 20, kSmall, threads);
    }
  }
}
