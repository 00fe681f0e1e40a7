"""The shim itself: it runs correct kernels correctly, and it finds what is wrong in wrong ones."""

from __future__ import annotations

import ctypes
import shutil
from collections.abc import Callable
from typing import ClassVar

import pytest
from cuda_on_host import build
from host_build import compiler

pytestmark = pytest.mark.skipif(shutil.which(compiler()[0]) is None, reason="no C++ compiler")

KERNELS = r"""
#include <cassert>
#include <cstdio>
#include <exception>

#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 256;

// Sums kThreads elements a block: lanes by shuffles, warps through shared memory.
template <class T, bool barrier>
__global__ void __launch_bounds__(kThreads) block_sum(const __grid_constant__ int, const T* in, T* out) {
  __shared__ T partial[kThreads / 32];
  T sum = __ldg(in + blockIdx.x * kThreads + threadIdx.x);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(0xffffffffu, sum, offset);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  if (barrier) __syncthreads();
  if (threadIdx.x < 32) {
    sum = threadIdx.x < kThreads / 32 ? partial[threadIdx.x] : T(0);
    for (int lanes = 4; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lanes);
    if (threadIdx.x == 0) out[blockIdx.x] = sum;
  }
}

// Every thread passes a value on twice. Without the second barrier a fast one overwrites what a slow one has to read.
template <bool second_barrier>
__global__ void pass_on(int* out) {
  __shared__ int box[kThreads];
  int value = threadIdx.x;
  for (int step = 0; step < 2; ++step) {
    box[threadIdx.x] = value;
    __syncthreads();
    value = box[(threadIdx.x + 1) % kThreads];
    if (second_barrier) __syncthreads();
  }
  out[threadIdx.x] = value;
}

__global__ void garbage(unsigned* out) {
  __shared__ unsigned never_written[2];
  if (threadIdx.x == 0) out[blockIdx.x] = never_written[1];
  __syncthreads();
  never_written[1] = 0;  // not what the next block finds
}

__global__ void warp_operations(int* out) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 40) return;  // lane 8 of the second warp, the only one of its 16 lanes that ends early
  const unsigned mask = 0xffffffffu;
  int ok = __ballot_sync(mask, lane % 2 == 0) == (threadIdx.x < 32 ? 0x55555555u : 0x5455u);
  ok &= __any_sync(mask, lane == 3) && !__any_sync(mask, 0) && __all_sync(mask, 1) && !__all_sync(mask, lane != 3);
  ok &= __shfl_sync(mask, 10 * lane, 3) == 30 && __shfl_sync(mask, lane, 1, 4) == lane / 4 * 4 + 1;
  ok &= __shfl_up_sync(mask, lane, 1, 4) == (lane % 4 == 0 ? lane : lane - 1) || lane == 9;
  ok &= __shfl_down_sync(mask, double(lane), 1, 4) == (lane % 4 == 3 ? lane : lane + 1) || lane == 7;
  ok &= __shfl_xor_sync(mask, (1ll << 40) + lane, 2, 4) == (1ll << 40) + (lane ^ 2) || lane == 10;
  if (lane < 8) {  // half the warp goes another way
    ok &= __shfl_xor_sync(0xffu, float(lane), 7) == 7 - lane;
    __syncwarp(0xffu);
  }
  ok &= __syncthreads_count(lane < 4) == 8;
  ok &= __syncthreads_or(threadIdx.x == 47) && !__syncthreads_or(0);
  out[threadIdx.x] = ok;
}

__global__ void count(int* a, unsigned* b, unsigned long long* c) {
  atomicAdd(a, -1);
  atomicAdd(b, 2u);
  atomicAdd(c, 1ull << 40);
}

__global__ void order(unsigned* ticket, unsigned* out) {
  __syncwarp();
  out[atomicAdd(ticket, 1u)] = blockIdx.x * blockDim.x + threadIdx.x;
}

__global__ void divergent_barrier() {
  if (threadIdx.x < 100) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void barrier_against_shuffle() {
  if (threadIdx.x % 32 == 5) {
    __syncthreads();
  } else {
    __shfl_xor_sync(0xffffffffu, 1, 1);
  }
}
__global__ void mask_without_caller() { __syncwarp(0xfffffffeu); }
__global__ void false_assertion(int limit) { assert(int(threadIdx.x) < limit && "too far"); }
__global__ void unaligned(const char* p, float* out) { *out = reinterpret_cast<const float4*>(p)->w; }
__global__ void unaligned_copy(const char* p, uint4* out) { *out = __ldg(reinterpret_cast<const uint4*>(p)); }
__global__ void outside(int* out) {
  __shared__ int few[8];
  few[threadIdx.x] = 1;
  __syncthreads();
  *out = few[0];
}
__global__ void wide_shift(int* out, int by) { *out = 1u << by; }

template <class... E, class... A>
cudaError_t launch(dim3 grid, dim3 block, void (*kernel)(E...), A... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

char message[1000];

template <class F>
const char* run(F&& f) {
  try {
    const cudaError_t error = f();
    return error == cudaSuccess ? "" : cudaGetErrorString(cudaGetLastError());
  } catch (const std::exception& e) {
    std::snprintf(message, sizeof(message), "%s", e.what());
    return message;
  }
}

}  // namespace

#define EXPORT(name, ...) \
  extern "C" __attribute__((visibility("default"))) const char* name(int blocks, int threads, void* p, void* q) { \
    (void)p, (void)q; \
    return run([=] { return launch(blocks, threads, __VA_ARGS__); }); \
  }
EXPORT(sum_float, block_sum<float, true>, 0, (const float*)p, (float*)q)
EXPORT(sum_double, block_sum<double, true>, 0, (const double*)p, (double*)q)
EXPORT(sum_without_barrier, block_sum<float, false>, 0, (const float*)p, (float*)q)
EXPORT(pass_on_twice, pass_on<true>, (int*)q)
EXPORT(pass_on_without_barrier, pass_on<false>, (int*)q)
EXPORT(read_garbage, garbage, (unsigned*)q)
EXPORT(use_warp_operations, warp_operations, (int*)q)
EXPORT(count_threads, count, (int*)q, (unsigned*)q + 1, (unsigned long long*)q + 1)
EXPORT(record_order, order, (unsigned*)p, (unsigned*)q)
EXPORT(diverge_at_barrier, divergent_barrier)
EXPORT(barrier_and_shuffle, barrier_against_shuffle)
EXPORT(wrong_mask, mask_without_caller)
EXPORT(assert_below_five, false_assertion, 5)
EXPORT(load_unaligned, unaligned, (const char*)p + 4, (float*)q)
EXPORT(copy_unaligned, unaligned_copy, (const char*)p + 8, (uint4*)q)
EXPORT(index_outside, outside, (int*)q)
EXPORT(shift_by_32, wide_shift, (int*)q, 32)
"""

Call = Callable[..., str]


@pytest.fixture(scope="module")
def call(tmp_path_factory: pytest.TempPathFactory) -> Call:
    """Launches a kernel above by its exported name; returns what went wrong, if anything."""
    directory = tmp_path_factory.mktemp("shim")
    source = directory / "kernels.cu"
    source.write_text(KERNELS)
    library = ctypes.CDLL(str(build.build_kernels("kernels", [source], directory)))

    def launch(name: str, blocks: int, threads: int, p: object = None, q: object = None) -> str:
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        return str(function(blocks, threads, p, q).decode())

    return launch


@pytest.mark.parametrize(("name", "c_type"), [("sum_float", ctypes.c_float), ("sum_double", ctypes.c_double)])
def test_block_sum(call: Call, name: str, c_type: type[ctypes.c_float] | type[ctypes.c_double]) -> None:
    blocks = 5
    values = [(7 * i) % 101 for i in range(256 * blocks)]
    sums = (c_type * blocks)()
    assert call(name, blocks, 256, (c_type * len(values))(*values), sums) == ""
    assert list(sums) == [sum(values[256 * b : 256 * (b + 1)]) for b in range(blocks)]


def test_missing_barrier_after_writing_gives_a_wrong_sum(call: Call) -> None:
    sums = (ctypes.c_float * 8)()
    assert call("sum_without_barrier", 8, 256, (ctypes.c_float * 2048)(*[1.0] * 2048), sums) == ""
    assert sum(value == 256 for value in sums) < 4  # right by luck in a block where the first warp comes last


def test_missing_barrier_before_overwriting_gives_wrong_values(call: Call) -> None:
    out = (ctypes.c_int * 256)()
    expected = [(i + 2) % 256 for i in range(256)]
    assert call("pass_on_twice", 1, 256, None, out) == ""
    assert list(out) == expected
    assert call("pass_on_without_barrier", 1, 256, None, out) == ""
    assert list(out) != expected


def test_shared_memory_starts_every_block_as_garbage(call: Call) -> None:
    out = (ctypes.c_uint * 3)()
    assert call("read_garbage", 3, 32, None, out) == ""
    assert list(out) == [0x7FF7F7F7] * 3


def test_warp_operations(call: Call) -> None:
    out = (ctypes.c_int * 48)()
    out[40] = 1  # that thread ends early
    assert call("use_warp_operations", 1, 48, None, out) == ""
    assert list(out) == [1] * 48


def test_atomics_count(call: Call) -> None:
    class Counts(ctypes.Structure):
        _fields_: ClassVar = [("a", ctypes.c_int), ("b", ctypes.c_uint), ("c", ctypes.c_ulonglong)]

    counts = Counts()
    assert call("count_threads", 3, 100, None, ctypes.byref(counts)) == ""
    assert (counts.a, counts.b, counts.c) == (-300, 600, 300 << 40)


def test_order_is_random_and_the_seed_decides_it(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def order() -> list[int]:
        ticket, out = ctypes.c_uint(), (ctypes.c_uint * 256)()
        assert call("record_order", 4, 64, ctypes.byref(ticket), out) == ""
        return list(out)

    monkeypatch.setenv("FASTFOCAL_HOST_SEED", "0")
    first, again = order(), order()
    monkeypatch.setenv("FASTFOCAL_HOST_SEED", "1")
    other = order()
    assert first == again != other
    assert sorted(first) == sorted(other) == list(range(256)) != first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("diverge_at_barrier", "wait for each other forever: 100 of them (the first is 0) at __syncthreads in "),
        ("barrier_and_shuffle", "of them (the first is 0) at __shfl_xor_sync in "),
        ("wrong_mask", "CUDA error: __syncwarp: the mask leaves out the calling lane"),
        ("assert_below_five", 'CUDA error: device-side assert triggered: int(threadIdx.x) < limit && "too far" ('),
        ("load_unaligned", "CUDA error: misaligned address"),
        ("copy_unaligned", "CUDA error: misaligned address"),
        ("index_outside", "outside of an array of type 'int [8]'"),
        ("shift_by_32", "CUDA error: shift by a negative number, or by the width or more"),
    ],
)
def test_errors_are_thrown_at_the_launch(call: Call, name: str, message: str) -> None:
    aligned = (ctypes.c_char * 80)()
    p = ctypes.c_void_p((ctypes.addressof(aligned) + 15) // 16 * 16)
    q = ctypes.c_void_p(p.value + 32 if p.value else None)
    assert message in call(name, 2, 128, p, q)
    test_atomics_count(call)  # the next launch is not disturbed


def test_launch_configurations_that_a_gpu_refuses(call: Call) -> None:
    assert call("wrong_mask", 0, 32) == "invalid configuration argument"
    assert call("wrong_mask", 1, 1025) == "invalid configuration argument"
