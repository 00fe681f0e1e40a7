// Stands in for CUDA's header of this name, so that a host C++ compiler compiles kernels unchanged and runs them on the
// CPU: see ../README.md. Only what the kernels use is here; what is missing is a compile error. The scheduler that runs
// the threads is ../scheduler.cpp.
//
// __CUDACC__ and __CUDA_ARCH__ stay undefined: kernels take their portable branch where they have one.
#pragma once

#include <assert.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <tuple>
#include <type_traits>
#include <utility>

// ---------------------------------------------------------------------------------------------------------------------
// Language

#define __host__
#define __device__
#define __global__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ __inline__ __attribute__((always_inline))
#define __align__(bytes) __attribute__((aligned(bytes)))
// thread_local gathers every shared variable, those of function templates too, in one piece of memory that the
// scheduler can find and fill with garbage before each block; __attribute__((section)) is ignored inside templates.
// An alignas has to stand in front of __shared__ (an __align__ anywhere).
#define __shared__ static thread_local

// ---------------------------------------------------------------------------------------------------------------------
// Types

#define CUDA_ON_HOST_VECTORS(T, name, align2, align4)        \
  struct alignas(align2) name##2 { T x, y; };                \
  struct alignas(align4) name##4 { T x, y, z, w; };          \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_ON_HOST_VECTORS(signed char, char, 2, 4)
CUDA_ON_HOST_VECTORS(unsigned char, uchar, 2, 4)
CUDA_ON_HOST_VECTORS(short, short, 4, 8)
CUDA_ON_HOST_VECTORS(unsigned short, ushort, 4, 8)
CUDA_ON_HOST_VECTORS(int, int, 8, 16)
CUDA_ON_HOST_VECTORS(unsigned, uint, 8, 16)
CUDA_ON_HOST_VECTORS(long long, longlong, 16, 16)
CUDA_ON_HOST_VECTORS(unsigned long long, ulonglong, 16, 16)
CUDA_ON_HOST_VECTORS(float, float, 8, 16)
CUDA_ON_HOST_VECTORS(double, double, 16, 16)
#undef CUDA_ON_HOST_VECTORS

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// One block runs at a time, and the scheduler sets these before it resumes a thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------------------------------------------------------------
// Barriers and warp operations: each gives control back to the scheduler until all its threads have arrived.

namespace cuda_on_host {

enum class Operation { syncthreads, syncthreads_or, syncthreads_and, syncthreads_count, syncwarp, ballot, shuffle };

// Where a thread waits. Threads meet only at the same operation of the same source line.
struct Site {
  Operation operation;
  const char* name;
  const char* file;
  int line;
};

int lane();
std::uint64_t meet_block(const Site& site, bool predicate);
// mask: the lanes that take part. The result is, for shuffle, the bits that lane `source` gave (garbage if it takes no
// part); for ballot, the lanes that gave bits != 0.
std::uint64_t meet_warp(const Site& site, unsigned mask, std::uint64_t bits, int source);

template <class T>
T shuffle(const Site& site, unsigned mask, T value, int source) {
  static_assert(std::is_arithmetic<T>::value && (sizeof(T) == 4 || sizeof(T) == 8), "shuffles move 4 or 8 bytes");
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = meet_warp(site, mask, bits, source);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace cuda_on_host

// Defaults evaluated where the kernel calls: the call's own file and line.
#define CUDA_ON_HOST_HERE const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CUDA_ON_HOST_SITE(operation) \
  cuda_on_host::Site { cuda_on_host::Operation::operation, __func__, file, line }

inline void __syncthreads(CUDA_ON_HOST_HERE) { cuda_on_host::meet_block(CUDA_ON_HOST_SITE(syncthreads), false); }
inline int __syncthreads_or(int predicate, CUDA_ON_HOST_HERE) {
  return int(cuda_on_host::meet_block(CUDA_ON_HOST_SITE(syncthreads_or), predicate != 0));
}
inline int __syncthreads_and(int predicate, CUDA_ON_HOST_HERE) {
  return int(cuda_on_host::meet_block(CUDA_ON_HOST_SITE(syncthreads_and), predicate != 0));
}
inline int __syncthreads_count(int predicate, CUDA_ON_HOST_HERE) {
  return int(cuda_on_host::meet_block(CUDA_ON_HOST_SITE(syncthreads_count), predicate != 0));
}

inline void __syncwarp(unsigned mask = 0xffffffffu, CUDA_ON_HOST_HERE) {
  cuda_on_host::meet_warp(CUDA_ON_HOST_SITE(syncwarp), mask, 0, 0);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_HOST_HERE) {
  return unsigned(cuda_on_host::meet_warp(CUDA_ON_HOST_SITE(ballot), mask, predicate != 0, 0));
}
inline int __any_sync(unsigned mask, int predicate, CUDA_ON_HOST_HERE) {
  return cuda_on_host::meet_warp(CUDA_ON_HOST_SITE(ballot), mask, predicate != 0, 0) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CUDA_ON_HOST_HERE) {
  return cuda_on_host::meet_warp(CUDA_ON_HOST_SITE(ballot), mask, predicate == 0, 0) == 0;
}

// A source outside the caller's segment of `width` lanes gives the caller's own value back.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_HOST_HERE) {
  const int first = cuda_on_host::lane() & -width;
  return cuda_on_host::shuffle(CUDA_ON_HOST_SITE(shuffle), mask, value, first + (source & (width - 1)));
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_HOST_HERE) {
  const int self = cuda_on_host::lane();
  const bool inside = (self & (width - 1)) + delta < unsigned(width);
  return cuda_on_host::shuffle(CUDA_ON_HOST_SITE(shuffle), mask, value, inside ? self + int(delta) : self);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, CUDA_ON_HOST_HERE) {
  const int self = cuda_on_host::lane();
  const bool inside = unsigned(self & (width - 1)) >= delta;
  return cuda_on_host::shuffle(CUDA_ON_HOST_SITE(shuffle), mask, value, inside ? self - int(delta) : self);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, CUDA_ON_HOST_HERE) {
  const int self = cuda_on_host::lane();
  const int source = (self ^ lane_mask) & 31;
  const bool inside = source < (self & -width) + width;  // an earlier segment may be read, a later one may not
  return cuda_on_host::shuffle(CUDA_ON_HOST_SITE(shuffle), mask, value, inside ? source : self);
}

#undef CUDA_ON_HOST_HERE
#undef CUDA_ON_HOST_SITE

// ---------------------------------------------------------------------------------------------------------------------
// Memory. Threads of a launch run on one CPU thread and change only where they meet, so plain accesses are atomic.

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, const T& value) {
  *p = value;
}
template <class T>
void __stcg(T* p, const T& value) {
  *p = value;
}

namespace cuda_on_host {
template <class T>
T fetch_add(T* p, T value) {
  const T old = *p;
  *p = T(old + value);
  return old;
}
}  // namespace cuda_on_host

// No floating point version: an order of additions that changes from run to run has no place in these kernels.
inline int atomicAdd(int* p, int value) { return int(cuda_on_host::fetch_add((unsigned*)p, unsigned(value))); }
inline unsigned atomicAdd(unsigned* p, unsigned value) { return cuda_on_host::fetch_add(p, value); }
inline unsigned long long atomicAdd(unsigned long long* p, unsigned long long value) {
  return cuda_on_host::fetch_add(p, value);
}

inline void __threadfence() {}
inline void __threadfence_block() {}

// ---------------------------------------------------------------------------------------------------------------------
// Integers and bits

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(unsigned(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((std::uint64_t(a) * b) >> 32); }
inline int __mulhi(int a, int b) { return int((std::int64_t(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)(((unsigned __int128)a * b) >> 64);
}

namespace cuda_on_host {
template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
}  // namespace cuda_on_host
inline int __float_as_int(float x) { return cuda_on_host::bits_as<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_on_host::bits_as<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_on_host::bits_as<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_host::bits_as<float>(x); }

// CUDA has min and max without a namespace.
#define CUDA_ON_HOST_MIN_MAX(T)                       \
  constexpr T min(T a, T b) { return b < a ? b : a; } \
  constexpr T max(T a, T b) { return a < b ? b : a; }
CUDA_ON_HOST_MIN_MAX(int)
CUDA_ON_HOST_MIN_MAX(unsigned)
CUDA_ON_HOST_MIN_MAX(long)
CUDA_ON_HOST_MIN_MAX(unsigned long)
CUDA_ON_HOST_MIN_MAX(long long)
CUDA_ON_HOST_MIN_MAX(unsigned long long)
#undef CUDA_ON_HOST_MIN_MAX
// With one NaN, CUDA gives the other number.
constexpr float min(float a, float b) { return b < a || a != a ? b : a; }
constexpr float max(float a, float b) { return a < b || a != a ? b : a; }
constexpr double min(double a, double b) { return b < a || a != a ? b : a; }
constexpr double max(double a, double b) { return a < b || a != a ? b : a; }

// ---------------------------------------------------------------------------------------------------------------------
// Runtime library

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorUnsupportedPtxVersion = 222,
  cudaErrorNotSupported = 801,
};

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
};

#define CUDART_VERSION 13000

typedef struct CUstream_st* cudaStream_t;

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
  cudaLaunchAttributeProgrammaticStreamSerialization = 6,
};

union cudaLaunchAttributeValue {
  int cooperative;
  struct {
    unsigned x, y, z;
  } clusterDim;
  int programmaticStreamSerializationAllowed;
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
cudaError_t cudaDriverGetVersion(int* version);
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);
// The number of multiprocessors is small (environment variable FASTFOCAL_HOST_SMS, default 3), so that in a small test
// too a persistent grid has several blocks and each block several tiles.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

inline cudaError_t cudaMemsetAsync(void* p, int value, std::size_t bytes, cudaStream_t = nullptr) {
  if (bytes > 0) std::memset(p, value, bytes);
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel, int, std::size_t) {
  *blocks = 2;
  return cudaSuccess;
}

namespace cuda_on_host {
// Runs `thread` once for every thread of every block. Throws what went wrong in a thread; returns an error for a
// configuration that a GPU would refuse.
cudaError_t launch(const cudaLaunchConfig_t& config, const std::function<void()>& thread);
}  // namespace cuda_on_host

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
  // Converted once, as at a real launch; every thread gets its own copy, as parameters are per thread.
  const std::tuple<std::decay_t<Expected>...> parameters(std::forward<Actual>(actual)...);
  return cuda_on_host::launch(*config, [&] { std::apply(kernel, parameters); });
}
