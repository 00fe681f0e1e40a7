// Labels -> codes on the CPU: checks every label, resolves the caller's conventions and counts, in one pass.
#include <sstream>
#include <stdexcept>

#include "device.h"

namespace fastfocal {
namespace {

struct Found {
  int64_t positives = 0, ignored = 0;
  int64_t bad = -1;  // position of the first label that is none of the three kinds
};

template <class L>
const L* labels_of(const LabelCall& call, const Chunk& chunk) {
  const LabelLevel& level = call.level[chunk.level];
  return static_cast<const L*>(level.labels) + chunk.image * level.image_stride;
}

template <class L, class C>
Found encode_chunk(const LabelCall& call, const Chunk& chunk) {
  const LabelLevel& level = call.level[chunk.level];
  const L* labels = labels_of<L>(call, chunk);
  C* codes = static_cast<C*>(call.codes) + level.first_anchor + chunk.image * level.anchors;
  // code_position(), stepped along instead of divided out.
  const int64_t per_cell = level.per_cell.divisor, stride = per_cell == 1 ? 1 : level.cells;
  int64_t at = code_position(level, chunk.begin);
  int64_t a = chunk.begin % per_cell;
  Found found;
  for (int64_t m = chunk.begin; m < chunk.end; ++m) {
    const int64_t code = code_of(call, static_cast<int64_t>(labels[m * level.anchor_stride]));
    if (code == kInvalid) {
      found.bad = m;
      return found;
    }
    found.ignored += code == kIgnored;
    found.positives += code >= 0;
    codes[at] = static_cast<C>(code);
    at += stride;
    if (per_cell > 1 && ++a == per_cell) {
      a = 0;
      at -= per_cell * stride - 1;  // the next cell's first anchor
    }
  }
  return found;
}

// Calls f with a null pointer of the labels' type.
template <class F>
auto with_label_type(LabelType type, const F& f) {
  switch (type) {
    case LabelType::kInt64:
      return f(static_cast<int64_t*>(nullptr));
    case LabelType::kInt32:
      return f(static_cast<int32_t*>(nullptr));
    case LabelType::kInt16:
      return f(static_cast<int16_t*>(nullptr));
    case LabelType::kInt8:
      return f(static_cast<int8_t*>(nullptr));
    default:
      return f(static_cast<uint8_t*>(nullptr));
  }
}

[[noreturn]] void reject(const LabelCall& call, const Chunk& chunk, int64_t m) {
  const int64_t label = with_label_type(call.type, [&](auto* type) {
    using L = std::remove_pointer_t<decltype(type)>;
    return static_cast<int64_t>(labels_of<L>(call, chunk)[m * call.level[chunk.level].anchor_stride]);
  });
  const int64_t first = call.background == 0 ? 1 : 0;
  std::ostringstream message;
  message << "targets[" << call.first_level + chunk.level << "]: label " << label << " at image " << chunk.image
          << ", anchor " << m << "; expected one of the classes " << first << ".." << call.classes - 1 + first
          << ", background_index " << call.background << " or ignore_index " << call.ignore;
  throw std::invalid_argument(message.str());  // reaches Python as a ValueError
}

}  // namespace

void Cpu::encode(const LabelCall& call, const Tensor&) {
  std::vector<Found> found(static_cast<size_t>(call.chunks));
  torch::stable::parallel_for(0, call.chunks, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Chunk chunk = chunk_at(call, i);
      found[static_cast<size_t>(i)] = with_label_type(call.type, [&](auto* type) {
        using L = std::remove_pointer_t<decltype(type)>;
        return call.wide_codes ? encode_chunk<L, int32_t>(call, chunk) : encode_chunk<L, int16_t>(call, chunk);
      });
    }
  });
  for (int64_t i = 0; i < call.chunks; ++i) {
    const Chunk chunk = chunk_at(call, i);
    const Found& f = found[static_cast<size_t>(i)];
    if (f.bad >= 0) reject(call, chunk, f.bad);
    call.counts[2 * chunk.image] += f.positives;
    call.counts[2 * chunk.image + 1] += f.ignored;
  }
}

void Cpu::count(const CountCall& call, const Tensor&) {
  const int64_t divisors = call.count == Count::kPositivesPerImage ? call.images : 1;
  for (int64_t i = 0; i < divisors; ++i) call.divisor[i] = divisor_of(call, i);
}

}  // namespace fastfocal
