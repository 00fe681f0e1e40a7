// What the *.cu files give: each launches on the context's stream and returns without waiting.
#pragma once

#include "../call.h"
#include "context.h"

namespace fastfocal::cuda {

void run(const Call& call, const Context& context);
void reduce(const Call& call, void* loss, int64_t size, bool add, const Context& context);
void encode(const LabelCall& call, const Context& context);
void count(const CountCall& call, const Context& context);
void scale(const ScaleCall& call, const Context& context);

// run() by dtype, each in a translation unit of its own so that they compile side by side.
void run_plain_float32(const Call& call, const Context& context);
void run_plain_float16(const Call& call, const Context& context);
void run_plain_bfloat16(const Call& call, const Context& context);
void run_general_float32(const Call& call, const Context& context);
void run_general_float16(const Call& call, const Context& context);
void run_general_bfloat16(const Call& call, const Context& context);
void run_general_float64(const Call& call, const Context& context);

}  // namespace fastfocal::cuda
