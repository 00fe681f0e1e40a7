// Launching, and the sums of a block.
#pragma once

#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "../kernel_params.h"
#include "context.h"

namespace fastfocal::cuda {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

// Blocks that fill the device once. Asked of the driver once for each kernel and device.
template <class... P>
int64_t resident_blocks(void (*kernel)(P...), std::atomic<int> (&known)[kMaxDevices], const Context& context) {
  int blocks = context.device < kMaxDevices ? known[context.device].load(std::memory_order_relaxed) : 0;
  if (blocks == 0) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, kThreads, 0));
    if (blocks < 1) blocks = 1;
    if (context.device < kMaxDevices) known[context.device].store(blocks, std::memory_order_relaxed);
  }
  return int64_t(blocks) * context.multiprocessors;
}

template <class... P, class... A>
void launch(void (*kernel)(P...), int64_t blocks, const Context& context, A... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(kThreads);
  config.stream = context.stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

// The share of `items` that a block of a persistent grid takes: contiguous and balanced.
__device__ __forceinline__ int64_t first_item(int64_t items, unsigned block) {
  return items / gridDim.x * block + (items % gridDim.x) * block / gridDim.x;
}

// What the threads of a block share of a tile. One of them finds it out: it takes divisions.
struct TileWork {
  Tile tile;
  TileMap map;
  double scale;
  float negative, positive;  // the two classes' weights times scale
};

template <class S>
__device__ __forceinline__ const TileWork& begin_tile(const KernelParams& params, int64_t index) {
  __shared__ TileWork work;
  __syncthreads();  // the last tile is done
  if (threadIdx.x == 0) {
    work.tile = tile_at(params.levels, index);
    work.map = TileMap(params.levels, work.tile);
    work.scale = scale_of<S>(params, work.tile.level, work.tile.image);
    work.negative = float(params.negative_weight * work.scale);
    work.positive = float(params.positive_weight * work.scale);
  }
  __syncthreads();
  return work;
}

// Sum over the block, in an order fixed by the thread numbers; thread 0 has it.
template <class S>
__device__ __forceinline__ S block_sum(S x) {
  __shared__ S of_warp[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_down_sync(0xffffffffu, x, offset);
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  __syncthreads();  // the last sum has been read
  if (lane == 0) of_warp[warp] = x;
  __syncthreads();
  S sum = S(0);
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += of_warp[w];
  }
  return sum;
}

}  // namespace fastfocal::cuda
