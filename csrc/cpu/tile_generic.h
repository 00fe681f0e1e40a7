// A tile of everything else: what a block of elements needs is gathered into small arrays, then computed as vectors.
#pragma once

#include "tile_dense.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

template <class S>
struct Lanes;  // how many S one step takes, and how. load, store: the first n of them

template <>
struct Lanes<float> {
  using V = Vec;
  static constexpr int kCount = kLanes;
  template <class T>
  static Vec load(const T* p, int n = kCount) {
    return n == kCount ? FASTFOCAL_ISA::load(p) : load_first(p, n);
  }
  template <class T>
  static void store(T* p, Vec x, int n) {
    n == kCount ? FASTFOCAL_ISA::store(p, x) : store_first(p, x, n);
  }
  struct Total {
    Sum sum;
    void add(Vec x) { sum.add(x); }
    double value() const { return total(sum); }
  };
};

template <>
struct Lanes<double> {
  using V = double;
  static constexpr int kCount = 1;
  static double load(const double* p, int = 1) { return *p; }
  static void store(double* p, double x, int) { *p = x; }
  struct Total {
    double sum = 0;
    void add(double x) { sum += x; }
    double value() const { return sum; }
  };
};

// A block of elements: where they lie, as S, and what is gathered for them. Beyond its last element, up to a whole vector, the
// weights are 0.
template <class S>
struct Block {
  static constexpr int kMost = 256;
  // Whole vectors begin at cache lines.
  alignas(64) S negative[kMost];  // weights, times the scale;
  S positive[kMost] = {};         // with labels, positive ones where target is 1
  S target[kMost] = {};           // from labels, 0 or 1
  S ignored[kMost] = {};          // from these and the class mask, 0 or 1
  S score[kMost] = {};            // where target is 1
  S exponential[kMost];           // the first steps of negatives (see kTogether)
  S logarithm[kMost];
  bool any_positive = false, any_ignored = false;
  const S *logits, *soft_targets, *incoming;  // the latter two null where there are none
  S* out;                                     // null: nothing is wanted; may be where the logits are
};

template <class S>
class Gather {
 public:
  Gather(const KernelParams& params, const Tile& tile, S scale)
      : params_(params),
        map_(params.levels, tile),
        scale_(scale),
        rows_(map_.layout == Layout::kClassLast && map_.classes.divisor > 1),
        level_(params.levels.level[tile.level]),
        image_(tile.image),
        anchor_base_(level_.first_anchor + tile.image * level_.anchors),
        mask_(class_mask_of(params, tile.image)) {}

  // Elements [offset, offset + n) of the tile. The block holds what was gathered before them, or nothing.
  void operator()(uint32_t offset, int n, Block<S>* block) const {
    const bool weighted = params_.anchor_weight != nullptr || params_.class_weights != nullptr, masked = mask_ != nullptr;
    if (block->any_positive) fill(block->target, Block<S>::kMost, S(0));
    if (block->any_ignored && rows_) fill(block->ignored, Block<S>::kMost, S(0));  // planes write all of them
    block->any_positive = block->any_ignored = false;
    if (!weighted) {
      fill(block->negative, n, scale_ * negative_weight<S>(params_, 0));
      if (params_.soft) fill(block->positive, n, scale_ * positive_weight<S>(params_, 0));
    }
    if (weighted || masked || !params_.soft) {
      for (int i = 0, count; i < n; i += count) {
        const Place place = map_.at(offset + uint32_t(i));
        const int64_t anchor = anchor_base_ + place.anchor;
        if (rows_) {
          const int rest = int(map_.classes.divisor) - place.k;
          count = rest < n - i ? rest : n - i;
          if (weighted) weigh_row(anchor, place.k, i, count, block);
          if (!params_.soft) label_row(anchor, place.k, i, count, block);
          if (masked) mask_row(place.k, i, count, block);
        } else {
          const int64_t rest = map_.layout == Layout::kClassLast ? n : int64_t(map_.cells.divisor) - place.cell;
          count = rest < n - i ? int(rest) : n - i;
          if (weighted) weigh_plane(anchor, place.k, i, count, block);
          if (!params_.soft) label_plane(anchor, place.k, i, count, block);
          if (masked) mask_plane(place.k, i, count, block);
        }
      }
    }
    for (int i = n; i % Lanes<S>::kCount != 0; ++i) block->positive[i] = block->negative[i] = 0;
  }

 private:
  static void fill(S* p, int n, S x) {
    for (int i = 0; i < n; ++i) p[i] = x;
  }
  static void times(const S* __restrict__ from, int n, S x, S* __restrict__ to) {
    for (int i = 0; i < n; ++i) to[i] = x * from[i];
  }
  S weight_of(int64_t anchor) const {
    return params_.anchor_weight == nullptr ? scale_ : scale_ * static_cast<const S*>(params_.anchor_weight)[anchor];
  }
  void mark_positive(int64_t anchor, int k, int at, Block<S>* block) const {
    block->target[at] = 1;
    block->positive[at] = weight_of(anchor) * positive_weight<S>(params_, k);
    block->score[at] = score_of<S>(params_, level_, image_, anchor - anchor_base_);
    block->any_positive = true;
  }

  // Classes k, k + 1, ... of one anchor.
  void weigh_row(int64_t anchor, int k, int begin, int count, Block<S>* block) const {
    const S weight = weight_of(anchor);
    const S* const weights = static_cast<const S*>(params_.class_weights);
    if (weights == nullptr) {
      fill(block->negative + begin, count, weight * S(params_.negative_weight));
      if (params_.soft) fill(block->positive + begin, count, weight * S(params_.positive_weight));
    } else {
      times(weights + int64_t(map_.classes.divisor) + k, count, weight, block->negative + begin);
      if (params_.soft) times(weights + k, count, weight, block->positive + begin);
    }
  }
  void label_row(int64_t anchor, int k, int begin, int count, Block<S>* block) const {
    const int label = packed_label_at(params_, anchor);
    if (label == kIgnored) {
      fill(block->ignored + begin, count, S(1));
      block->any_ignored = true;
    } else if (label >= k && label < k + count) {
      mark_positive(anchor, label, begin + label - k, block);
    }
  }
  void mask_row(int k, int begin, int count, Block<S>* block) const {
    for (int i = 0; i < count; ++i) {
      if (is_present(k + i)) continue;
      block->ignored[begin + i] = 1;
      block->any_ignored = true;
    }
  }

  // One class of this anchor and those after it.
  void weigh_plane(int64_t anchor, int k, int begin, int count, Block<S>* block) const {
    weigh_anchors(anchor, count, negative_weight<S>(params_, k), block->negative + begin);
    if (params_.soft) weigh_anchors(anchor, count, positive_weight<S>(params_, k), block->positive + begin);
  }
  void weigh_anchors(int64_t anchor, int count, S weight, S* __restrict__ out) const {
    const S* __restrict__ const weights = static_cast<const S*>(params_.anchor_weight);
    const S scale = scale_;
    if (weights == nullptr) return fill(out, count, scale * weight);
    for (int i = 0; i < count; ++i) out[i] = scale * weights[anchor + i] * weight;
  }
  void label_plane(int64_t anchor, int k, int begin, int count, Block<S>* block) const {
    int positives = 0, ignored = 0;
    for (int i = 0; i < count; ++i) {
      const int label = packed_label_at(params_, anchor + i);
      block->ignored[begin + i] = S(label == kIgnored);
      positives += label == k;
      ignored += label == kIgnored;
    }
    block->any_ignored |= ignored > 0;
    for (int i = 0; positives > 0 && i < count; ++i)
      if (packed_label_at(params_, anchor + i) == k) mark_positive(anchor + i, k, begin + i, block);
  }
  void mask_plane(int k, int begin, int count, Block<S>* block) const {
    const bool present = is_present(k);
    if (params_.soft || !present) fill(block->ignored + begin, count, S(present ? 0 : 1));  // labels have written theirs
    block->any_ignored |= !present;
  }
  bool is_present(int k) const { return mask_[k * params_.mask_class_stride] != 0; }

  const KernelParams& params_;
  const TileMap map_;
  const S scale_;
  const bool rows_;  // a run of elements is an anchor's classes; else a class' anchors, as with a single class
  const Level& level_;
  const int64_t image_, anchor_base_;
  const uint8_t* const mask_;  // the image's, or null
};

// times_incoming() in vectors. least: rounds_to_zero() of the dtype
template <class V, class S>
inline V multiply_incoming(V grad, V incoming, S least) {
  using fastfocal::minus_absolute;
  const auto is_finite = V(-__builtin_inff()) < minus_absolute(incoming);
  return select(minus_absolute(grad) < select(is_finite, V(S(0)), V(-least)), grad * incoming, grad);
}

// Elements [0, n) of a block, whatever the dtype in memory is; returns nothing but what it adds to the sum.
template <bool kSoft, class S, class Loss>
void block_loop(const Loss loss_fn, const KernelParams& params, Block<S>* block, int n, S least,
                typename Lanes<S>::Total* sum) {
  using L = Lanes<S>;
  using V = typename L::V;
  // Copies that no store can change; so is loss_fn.
  const S *const x = block->logits, *const incoming = block->incoming;
  S* const out = block->out;
  const bool element_loss = params.output == Output::kElementLoss;
  const bool any_positive = block->any_positive, any_ignored = block->any_ignored;
  const V half = V(S(0.5)), zero = V(S(0));
  if constexpr (!kSoft) {
    for (int i = 0; i < n; i += L::kCount) {
      const int count = n - i < L::kCount ? n - i : L::kCount;
      L::store(block->exponential + i, loss_fn.exponential(L::load(x + i, count)), L::kCount);
    }
    if constexpr (Loss::kLogarithm) {
      for (int i = 0; i < n; i += L::kCount)
        L::store(block->logarithm + i, loss_fn.logarithm(L::load(block->exponential + i)), L::kCount);
    }
  }
  V part = zero;  // of kTogether at the most
  for (int i = 0; i < n; i += L::kCount) {
    const int count = n - i < L::kCount ? n - i : L::kCount;
    const V v = L::load(x + i, count);
    const V negative = L::load(block->negative + i);
    Term<V> t;
    V weight;
    if constexpr (kSoft) {
      const V y = L::load(block->soft_targets + i, count);
      t = loss_fn.soft(v, y);
      weight = Loss::soft_weight(y, L::load(block->positive + i), negative);
    } else {
      t = loss_fn.negative(v, L::load(block->exponential + i), Loss::kLogarithm ? L::load(block->logarithm + i) : zero);
      weight = negative;
      if (any_positive) {
        const Term<V> yes = loss_fn.positive(v, Loss::kScores ? L::load(block->score + i) : V(S(1)));
        const auto is_positive = half < L::load(block->target + i);
        t.loss = select(is_positive, yes.loss, t.loss);
        t.grad = select(is_positive, yes.grad, t.grad);
        weight = select(is_positive, L::load(block->positive + i), weight);
      }
    }
    V loss = weigh(t.loss, weight), grad = t.grad * weight;
    if (incoming != nullptr) grad = multiply_incoming(grad, L::load(incoming + i, count), least);
    if (any_ignored) {
      const auto is_ignored = half < L::load(block->ignored + i);
      loss = select(is_ignored, zero, loss);
      grad = select(is_ignored, zero, grad);
    }
    part = part + loss;
    if ((i / L::kCount + 1) % kTogether == 0 || i + L::kCount >= n) {
      sum->add(part);
      part = zero;
    }
    if (out != nullptr) L::store(out + i, element_loss ? loss : grad, count);
  }
}

template <class S, class Loss>
void generic_block(const Loss& loss_fn, const KernelParams& params, Block<S>* block, int n, S least,
                   typename Lanes<S>::Total* sum) {
  params.soft ? block_loop<true>(loss_fn, params, block, n, least, sum)
              : block_loop<false>(loss_fn, params, block, n, least, sum);
}

// run: generic_block() for the loss.
template <class T, class Run>
void generic_tile(const KernelParams& params, const Tile& tile, const Run& run, double* partial) {
  using S = Accumulation<T>;
  using L = Lanes<S>;
  constexpr int kMost = Block<S>::kMost;
  constexpr bool kCopies = sizeof(T) != sizeof(S);
  const Level& level = params.levels.level[tile.level];
  const int64_t base = tile.image * level.image_logits;
  const T* const x = static_cast<const T*>(level.logits) + base;
  T* const out = level.out == nullptr ? nullptr : static_cast<T*>(level.out) + base;
  const T* const incoming = params.incoming_elements ? static_cast<const T*>(level.incoming) + base : nullptr;
  const T* const soft = static_cast<const T*>(level.soft_targets) + (params.soft && !params.wide_soft_targets ? base : 0);
  const S* const wide = static_cast<const S*>(level.soft_targets) + (params.wide_soft_targets ? base : 0);

  const Gather<S> gather(params, tile, S(scale_of<S>(params, tile.level, tile.image)));
  Block<S> block;
  alignas(64) S copies[kCopies ? 4 : 1][kCopies ? kMost : 1];
  const auto as_s = [&](const T* p, int n, S* copy) {
    if constexpr (kCopies) {
      return as_floats(p, n, copy);
    } else {
      (void)n, (void)copy;
      return p;
    }
  };
  typename L::Total sum;
  for (int64_t start = tile.begin; start < tile.end; start += kMost) {
    const int n = tile.end - start < kMost ? int(tile.end - start) : kMost;
    gather(uint32_t(start - tile.begin), n, &block);
    block.logits = as_s(x + start, n, copies[0]);
    block.incoming = incoming == nullptr ? nullptr : as_s(incoming + start, n, copies[kCopies ? 1 : 0]);
    if (params.soft)
      block.soft_targets = params.wide_soft_targets ? wide + start : as_s(soft + start, n, copies[kCopies ? 2 : 0]);
    S* const copy_out = copies[kCopies ? 3 : 0];
    block.out = out == nullptr ? nullptr : kCopies ? copy_out : reinterpret_cast<S*>(out + start);
    // Here, not in the loop: it has no register to spare for two more addresses.
    for (int at = 0; at < n * int(sizeof(T)); at += 64) {
      __builtin_prefetch(reinterpret_cast<const char*>(x + start) + kPrefetch + at);
      if (out != nullptr) __builtin_prefetch(reinterpret_cast<const char*>(out + start) + kPrefetch + at, 1);
    }
    run(params, &block, n, S(rounds_to_zero<T>()), &sum);
    if constexpr (kCopies) {
      for (int i = 0; out != nullptr && i < n; i += L::kCount)
        L::store(out + start + i, L::load(copy_out + i), n - i < L::kCount ? n - i : L::kCount);
    }
  }
  if (partial != nullptr) *partial = sum.value();
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
