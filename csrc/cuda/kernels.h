// What the *.cu files give: each launches on the context's stream and returns without waiting.
#pragma once

#include "../kernel_params.h"
#include "context.h"

namespace fastfocal::cuda {

void run(const KernelParams& params, const Context& context);
void reduce(const KernelParams& params, void* loss, int64_t size, bool add, const Context& context);
void pack_labels(const PackLabelsParams& params, const Context& context);
void count(const CountParams& params, const Context& context);
void scale(const ScaleParams& params, const Context& context);

// run() for logits of type T; each T in a translation unit of its own (loss_*_*.cu), so that they compile side by side.
template <class T>
void run_fast(const KernelParams& params, const Context& context);
template <class T>
void run_generic(const KernelParams& params, const Context& context);
template <class T>
void run_softmax(const KernelParams& params, const Context& context);

}  // namespace fastfocal::cuda
