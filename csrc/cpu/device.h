// The CPU as a Device of operators.h.
#pragma once

#include "../operators.h"

namespace fastfocal {

struct Cpu {
  static void run(const Call& call, const Tensor& like);
  static void reduce(const Call& call, void* loss, int64_t size, bool add, const Tensor& like);
  static void fresh(void* memory, size_t bytes);
  static void encode(const LabelCall& call, const Tensor& like);
  static void count(const CountCall& call, const Tensor& like);
  static void scale(const ScaleCall& call, const Tensor& like);
};

}  // namespace fastfocal
