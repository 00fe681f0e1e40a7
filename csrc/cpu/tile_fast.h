// A tile of the fast case (is_fast in kernel_params.h): labels, and a constant weight for each of the two classes.
//
// Its logits are computed as negatives by branch-free loops over contiguous memory; the few positives and the ignored ones are
// kept out of their sum and output, and the positives are computed apart while the tile is in cache.
#pragma once

#include "isa.h"
#include "vec_math.h"

namespace fastfocal {
namespace FASTFOCAL_ISA {

using fastfocal::fused_multiply_add;  // beside Vec's, for double
using fastfocal::minus_absolute;
using fastfocal::select;

// Vectors that are taken together: all their exponentials first, then their logarithms where these are wanted twice, then the
// rest. The schedulers of a processor hold no more than four or five vectors' instructions, which wait for each other; half the
// chain at a time is twice as many vectors.
// It is also how many are added in float before they go to double: 16 roundings of 6e-8 at the most.
constexpr int kTogether = 16;
constexpr int kGroup = kTogether * kLanes;
constexpr int kPrefetch = 4096;  // bytes ahead, as the hardware's own prefetcher stops at 4 KiB pages
template <class T>
constexpr int kPerLine = 64 / (kLanes * int(sizeof(T)));  // vectors in a cache line: one prefetch for them
template <class T>
constexpr bool kPairs = false;  // two vectors are rounded and stored as one
template <>
constexpr bool kPairs<BFloat16> = true;

template <class T, class Loss, Output kOutput>
struct FastTile {
  static constexpr bool kLoss = kOutput != Output::kGradient;
  static constexpr bool kGradient = kOutput != Output::kLoss;

  const T* x;  // the image's logits
  T* g;        // its gradient, or null
  Loss loss_fn;
  float negative, positive;   // weight times scale, for the gradient
  const int16_t* all_labels;  // the image's packed labels
  int first_class;            // the label of the logits' class 0
  // The image's scores, or null: 1. Looked at only where the loss reads them. With a step, that many belong to each of `cells`
  // cells, whose labels lie [score_step][cells]; else they lie as the labels.
  const float* scores;
  int64_t score_step, cells;
  Sum negatives, many_positives;
  double positives = 0;

  int pending = 0;
  int64_t at[kLanes];
  float value[kLanes], score[kLanes];

  // The positives wait until a vector is full.
  void push(int64_t i, float logit, float of_anchor) {
    at[pending] = i;
    value[pending] = logit;
    if constexpr (Loss::kScores) score[pending] = of_anchor;
    if (++pending == kLanes) flush();
  }

  void flush() {
    if (pending == 0) return;
    for (int i = pending; i < kLanes; ++i) value[i] = 0;
    for (int i = pending; Loss::kScores && i < kLanes; ++i) score[i] = 1;
    const Term<Vec> t = loss_fn.positive(load(value), Loss::kScores ? load(score) : Vec(1.0f));
    float grad[kLanes], loss[kLanes];
    store(grad, t.grad * Vec(positive));
    store(loss, t.loss);
    for (int i = 0; i < pending; ++i) {
      positives += double(loss[i]);
      if (kGradient && g != nullptr) g[at[i]] = from_float<T>(grad[i]);
    }
    pending = 0;
  }

  // Of the anchor with this label, and of it and those after it.
  float score_of(const int16_t* label) const {
    if (!Loss::kScores || scores == nullptr) return 1.0f;
    const int64_t m = label - all_labels;
    return scores[score_step == 1 ? m : m % cells * score_step + m / cells];
  }
  Vec scores_of(const int16_t* label) const {
    if (!Loss::kScores || scores == nullptr) return Vec(1.0f);
    if (score_step == 1) return load(scores + (label - all_labels));
    float of_labels[kLanes];
    for (int i = 0; i < kLanes; ++i) of_labels[i] = score_of(label + i);
    return load(of_labels);
  }

  void logarithms(const float* exponential, int n, float* logarithm) const {
    if constexpr (Loss::kLogarithm) {
      for (int i = 0; i < n; i += kLanes) store(logarithm + i, loss_fn.logarithm(load(exponential + i)));
    }
  }
  static Vec load_logarithm(const float* logarithm) { return Loss::kLogarithm ? load(logarithm) : Vec(0.0f); }

  // 16-bit logits are expanded to float once, for both steps.
  static constexpr bool kExpands = sizeof(T) < sizeof(float);
  static Vec load_logit(const T* x, const float* expanded) {
    if constexpr (kExpands) {
      return load(expanded);
    } else {
      return load(x);
    }
  }

  // Logits [begin, end) as negatives. With labels, those of label k or ignored are left out and get gradient 0.
  template <bool kLabels>
  void run(int64_t begin, int64_t end, const int16_t* labels, int k) {
    constexpr int kAhead = kPrefetch / int(sizeof(T));
    const T* const x = this->x;  // copies that no store can change
    T* const g = this->g;
    const Loss loss_fn = this->loss_fn;
    const Vec weight(negative);
    int64_t i = begin;
    alignas(64) float expanded[kGroup], exponential[kGroup], logarithm[kGroup];
    while (i + kLanes <= end) {
      const int64_t stop = end - i < kTogether * kLanes ? end - kLanes : i + (kTogether - 1) * kLanes;
      const int64_t first = i;
      for (int64_t at = first; at <= stop;) {
        __builtin_prefetch(x + at + kAhead);
        for (int n = 0; n < kPerLine<T> && at <= stop; ++n, at += kLanes) {
          const Vec v = load(x + at);
          if (kExpands) store(expanded + (at - first), v);
          store(exponential + (at - first), loss_fn.exponential(v));
        }
      }
      logarithms(exponential, int(stop - first) + kLanes, logarithm);
      Vec sum(0.0f);
      const auto grad_at = [&](int64_t at) {
        const Vec v = load_logit(x + at, expanded + (at - first));
        const Term<Vec> t = loss_fn.negative(v, load(exponential + (at - first)), load_logarithm(logarithm + (at - first)));
        if (!kLabels) {
          if (kLoss) sum = sum + t.loss;
          return t.grad * weight;
        }
        const Labels c = load_labels(labels + (at - begin));
        const LabelMask found = equal(c, int16_t(k));
        const Mask special = either(found, equal(c, int16_t(kIgnored)));
        if (any(found)) hold(at, v);
        if (kLoss) sum = add_except(special, sum, t.loss);
        return multiply_except(special, t.grad, weight);
      };
      while (i + (kPerLine<T> - 1) * kLanes <= stop) {
        if constexpr (kGradient && kPairs<T>) {
          for (int n = 0; n < kPerLine<T>; n += 2, i += 2 * kLanes) {
            const Vec first = grad_at(i), second = grad_at(i + kLanes);
            store_pair(g + i, first, second);
          }
        } else {
          for (int n = 0; n < kPerLine<T>; ++n, i += kLanes) {
            const Vec grad = grad_at(i);
            if (kGradient) store(g + i, grad);
          }
        }
      }
      for (; i <= stop; i += kLanes) {
        const Vec grad = grad_at(i);
        if (kGradient) store(g + i, grad);
      }
      if (kLoss) negatives.add(sum);
      for (int h = 0; h < holding; ++h)
        overwrite_positives(held[h], load(held_value + h * kLanes), labels + (held[h] - begin), k);
      holding = 0;
    }
    if (i < end) {
      const int n = int(end - i);
      const Vec v = load_first(x + i, n);
      const Term<Vec> t = loss_fn.negative(v);
      Mask special = lanes_from(n);
      bool any_found = false;
      if (kLabels) {
        const Labels c = load_first_labels(labels + (i - begin), n, int16_t(kBackground));
        const LabelMask found = equal(c, int16_t(k));
        special = either(special, either(found, equal(c, int16_t(kIgnored))));
        any_found = any(found);
      }
      if (kLoss) negatives.add(zero_where(special, t.loss));
      if (kGradient) store_first(g + i, multiply_except(special, t.grad, weight), n);
      if (any_found) {
        float logit[kLanes];
        store(logit, v);
        for (int lane = 0; lane < n; ++lane)
          if (labels[i - begin + lane] == k) push(i + lane, logit[lane], score_of(labels + (i - begin) + lane));
      }
    }
  }

  // Vectors with a positive met inside the loop above, saved before g overwrites them (it may be x). Their positives are
  // computed after the loop, so that its registers are not spilled for them.
  int holding = 0;
  int64_t held[kTogether];
  float held_value[kGroup];
  void hold(int64_t at, Vec v) {
    held[holding] = at;
    store(held_value + holding++ * kLanes, v);
  }
  void overwrite_positives(int64_t at, Vec v, const int16_t* labels, int k) {
    const LabelMask found = equal(load_labels(labels), int16_t(k));
    const Mask is_positive = either(found, found);
    const Term<Vec> t = loss_fn.positive(v, scores_of(labels));
    if (kLoss) many_positives.add(select(is_positive, t.loss, Vec(0.0f)));
    if (kGradient) store(g + at, select(is_positive, t.grad * Vec(positive), load(g + at)));
  }

  void zero(int64_t begin, int64_t end) {
    if (kGradient && end > begin) memset(static_cast<void*>(g + begin), 0, size_t(end - begin) * sizeof(T));
  }

  // Anchors' rows. Groups with a positive or ignored logit are computed apart, and what lies between them is one run.
  void class_last(const int16_t* labels, int classes, int64_t begin, int64_t end) {
    const auto in_rows = [=](int64_t from, int64_t to, const auto& found) {
      for (int64_t anchor = from / classes, row = anchor * classes; row < to; ++anchor, row += classes) {
        const int label = label_within(labels[anchor], first_class, uint32_t(classes));
        if (label == kBackground) continue;
        if (label == kIgnored) {
          found(row < from ? from : row, row + classes < to ? row + classes : to, nullptr);
        } else if (row + label >= from && row + label < to) {
          found(row + label, row + label + 1, labels + anchor);
        }
      }
    };
    int64_t start = begin;
    for (int64_t anchor = begin / classes; anchor * classes < end; ++anchor) {
      const int label = label_within(labels[anchor], first_class, uint32_t(classes));
      if (label == kBackground) continue;
      const int64_t row = anchor * classes, first = label != kIgnored ? row + label : row < start ? start : row;
      if (first < start || first >= end) continue;
      const int64_t from = begin + (first - begin) / kGroup * kGroup, to = from + kGroup < end ? from + kGroup : end;
      run<false>(start, from, nullptr, 0);
      mixed(from, to, in_rows);
      start = to;
      anchor = to / classes - 1;  // its successor's row may have begun in this group
    }
    run<false>(start, end, nullptr, 0);
  }

  // A group of logits, some positive or ignored. These are -inf among the negatives, which costs nothing.
  // specials(begin, end, found) calls found(from, to, label) for each of them; label: where it lies, null of what is ignored.
  template <class Specials>
  void mixed(int64_t begin, int64_t end, const Specials& specials) {
    constexpr float kNothing = -__builtin_inff();
    alignas(64) float logit[kGroup], exponential[kGroup], logarithm[kGroup];
    const int n = int(end - begin);
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(logit + i, load(x + begin + i));
    if (i < n) store(logit + i, load_first(x + begin + i, n - i));
    for (i = n; i % kLanes != 0; ++i) logit[i] = kNothing;

    int positives_here = 0, where[kGroup];
    float positive_logit[kGroup], positive_score[kGroup];
    bool any_ignored = false;
    specials(begin, end, [&](int64_t from, int64_t to, const int16_t* label) {
      if (label != nullptr) {
        where[positives_here] = int(from - begin);
        if constexpr (Loss::kScores) positive_score[positives_here] = score_of(label);
        positive_logit[positives_here++] = logit[from - begin];
      }
      any_ignored |= label == nullptr;
      for (int64_t at = from; at < to; ++at) logit[at - begin] = kNothing;
    });

    Vec sum(0.0f);
    for (i = 0; i < n; i += kLanes) store(exponential + i, loss_fn.exponential(load(logit + i)));
    logarithms(exponential, n, logarithm);
    for (i = 0; i < n; i += kLanes) {
      const Term<Vec> t = loss_fn.negative(load(logit + i), load(exponential + i), load_logarithm(logarithm + i));
      if (kLoss) sum = sum + t.loss;
      if (!kGradient) continue;
      if (i + kLanes <= n) {
        store(g + begin + i, t.grad * Vec(negative));
      } else {
        store_first(g + begin + i, t.grad * Vec(negative), n - i);
      }
    }
    if (kLoss) negatives.add(sum);
    for (i = 0; i < positives_here; ++i) push(begin + where[i], positive_logit[i], Loss::kScores ? positive_score[i] : 1.0f);
    if (!any_ignored) return;
    // 0 times a weight that is not finite would be NaN.
    specials(begin, end, [&](int64_t from, int64_t to, const int16_t* label) {
      if (label == nullptr) zero(from, to);
    });
  }

  // Planes: the cells of one class of one anchor shape; the labels lie in the same order.
  void class_first(const int16_t* labels, int classes, int64_t cells, int64_t begin, int64_t end) {
    if (cells < kGroup && classes > 1) return short_planes(labels, classes, cells, begin, end);
    planes(labels, classes, cells, begin, end);
  }

  void planes(const int16_t* labels, int classes, int64_t cells, int64_t begin, int64_t end) {
    int64_t plane = begin / cells;
    for (int64_t i = begin; i < end; ++plane) {
      const int64_t stop = (plane + 1) * cells < end ? (plane + 1) * cells : end;
      run<true>(i, stop, labels + plane / classes * cells + (i - plane * cells), first_class + int(plane % classes));
      i = stop;
    }
  }

  static constexpr uint64_t kFourBackground = ~uint64_t(0);
  static_assert(kBackground == -1, "four labels of background are 64 set bits");

  // Planes shorter than a group. All classes of one anchor shape are one run of memory, whose positives and ignored logits
  // follow from the few anchors that are not background; where these are not few, it is plane by plane as with longer ones.
  void short_planes(const int16_t* labels, int classes, int64_t cells, int64_t begin, int64_t end) {
    const int64_t length = classes * cells, few = cells < 64 ? 16 : cells / 4;
    for (int64_t shape = begin / length, i = begin; i < end; ++shape) {
      const int64_t base = shape * length, stop = base + length < end ? base + length : end;
      const int16_t* const label = labels + shape * cells;
      int special = 0, cell[kGroup];
      bool any_ignored = false;
      for (int c = 0; c < int(cells) && special <= few;) {
        uint64_t four = 0;
        if (c + 4 <= int(cells)) memcpy(&four, label + c, sizeof(four));
        if (four == kFourBackground) {
          c += 4;
          continue;
        }
        if (label_within(label[c], first_class, uint32_t(classes)) != kBackground) cell[special++] = c;
        any_ignored |= label[c++] == kIgnored;
      }
      if (special > few) {
        planes(labels, classes, cells, i, stop);
        i = stop;
        continue;
      }
      const auto in_planes = [&](int64_t from, int64_t to, const auto& found) {
        for (int s = 0; s < special; ++s) {
          const int k = label_within(label[cell[s]], first_class, uint32_t(classes));
          int64_t at = base + cell[s];
          if (k != kIgnored) {
            at += k * cells;
            if (at >= from && at < to) found(at, at + 1, label + cell[s]);
          } else {
            if (at < from) at += (from - at + cells - 1) / cells * cells;
            for (; at < to; at += cells) found(at, at + 1, nullptr);
          }
        }
      };
      int64_t start = i;
      for (int64_t from = i; special > 0 && from < stop; from += kGroup) {
        const int64_t to = from + kGroup < stop ? from + kGroup : stop;
        bool here = any_ignored;  // in every plane, so in nearly every group
        for (int s = 0; s < special && !here; ++s) {
          const int64_t at = base + (label[cell[s]] - first_class) * cells + cell[s];
          here = at >= from && at < to;
        }
        if (!here) continue;
        run<false>(start, from, nullptr, 0);
        mixed(from, to, in_planes);
        start = to;
      }
      run<false>(start, stop, nullptr, 0);
      i = stop;
    }
  }
};

// A NaN without the payload that a caller's normalizer may have carried: store_pair() cannot round one.
inline float canonical(float x) { return x == x ? x : __builtin_nanf(""); }

template <class T, class Loss, Output kOutput>
void fast_tile(const KernelParams& params, const Tile& tile, const Loss& loss_fn, double* partial) {
  const Level& level = params.levels.level[tile.level];
  const double scale = scale_of<float>(params, tile.level, tile.image);
  FastTile<T, Loss, kOutput> work;
  work.x = static_cast<const T*>(level.logits) + tile.image * level.image_logits;
  work.g = level.out == nullptr ? nullptr : static_cast<T*>(level.out) + tile.image * level.image_logits;
  work.loss_fn = loss_fn;
  work.negative = canonical(float(params.negative_weight * scale));
  work.positive = canonical(float(params.positive_weight * scale));
  const int64_t first_anchor = level.first_anchor + tile.image * level.anchors;
  const int16_t* labels = static_cast<const int16_t*>(params.packed_labels) + first_anchor;
  work.all_labels = labels;
  work.first_class = params.first_class;
  work.scores = static_cast<const float*>(params.scores);
  work.score_step = 1;
  if (work.scores != nullptr && params.scores_are_rows) {
    work.scores += tile.image * params.score_image_stride + level.first_score;
    work.cells = level.cells.divisor;
    if (level.layout == Layout::kClassFirst) work.score_step = level.anchors / work.cells;
  } else if (work.scores != nullptr) {
    work.scores += first_anchor;
  }
  const int classes = int(params.levels.classes.divisor);
  if (level.layout == Layout::kClassFirst) {
    work.class_first(labels, classes, level.cells.divisor, tile.begin, tile.end);
  } else if (classes == 1) {  // one plane of all anchors
    work.class_first(labels, 1, level.anchors, tile.begin, tile.end);
  } else {
    work.class_last(labels, classes, tile.begin, tile.end);
  }
  work.flush();
  if (partial != nullptr)
    *partial = weigh(weigh(total(work.negatives), params.negative_weight) +
                         weigh(work.positives + total(work.many_positives), params.positive_weight),
                     scale);
}

}  // namespace FASTFOCAL_ISA
}  // namespace fastfocal
