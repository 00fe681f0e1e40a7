// All levels of one call: where their memory lies, which anchor and class a logit belongs to, and how the levels together
// split into equal tiles. Plain structs and index arithmetic, for the host and the device; a CUDA kernel takes Levels by
// value.
#pragma once

#include <cstdint>

#include "half.h"

namespace fastfocal {

// The two physical orders of an image's logits.
enum class Layout : int32_t {
  kClassLast,   // [anchor][class]: (M, K), (N, M, K), and channels_last (N, A*K, H, W), whose order is [h][w][a][k]
  kClassFirst,  // [a][k][cell]: contiguous (N, A*K, H, W), cell = h*W + w
};

// Unsigned division by a number fixed for the whole call: a multiplication where the product of the two fits 32 bits.
struct Divisor {
  uint32_t divisor = 1;
  uint32_t magic = 0;  // ceil(2^32 / divisor), or 0: divide

  Divisor() = default;
  // n, the largest number that will be divided.
  Divisor(uint32_t d, uint64_t n)
      : divisor(d), magic(d > 1 && n * d <= UINT32_MAX ? uint32_t((1ull << 32) / d + ((1ull << 32) % d != 0)) : 0) {}

  FASTFOCAL_HD uint32_t of(uint32_t n) const { return magic != 0 ? uint32_t((uint64_t(n) * magic) >> 32) : n / divisor; }
};

// How one level's share of the work is cut: pieces are numbered level by level, image by image.
struct Span {
  int64_t first;      // pieces of the levels before this one
  int64_t per_image;  // pieces of an image; 0 for an empty level
};

struct Piece {
  int32_t level;
  int64_t image, index;
};

// spans(l) is the Span of level l.
template <class Spans>
FASTFOCAL_HD Piece piece_at(int count, const Spans& spans, int64_t index) {
  int l = 0;
  while (l + 1 < count && index >= spans(l + 1).first) ++l;
  const Span span = spans(l);
  const int64_t in_level = index - span.first;
  const int64_t image = in_level / span.per_image;
  return {l, image, in_level - image * span.per_image};
}

constexpr int kMaxLevels = 16;     // in one launch; more levels are more launches
constexpr int kTileLogits = 8192;  // a tile's logits: enough to amortise its set-up, few enough to stay in cache
constexpr int kTileAlignment = 8;  // tiles start at multiples of this many logits from the level's start

struct Level {
  const void* logits;        // [image][image_logits]
  void* out;                 // gradient or elementwise loss, in the logits' order; null: not wanted
  const void* soft_targets;  // in the logits' order
  const void* incoming;      // elementwise incoming gradient, in the logits' order
  const void* direction;     // of a second derivative, in the logits' order; null: 0
  void* along;               // the gradient times direction, elementwise, in the logits' order; null: not wanted
  int64_t first_anchor;      // position of this level's first anchor in the packed labels and in the weights
  int64_t first_score;       // position of its first anchor among an image's scores, where these are the caller's rows
  int64_t anchors;           // M, anchors of an image
  int64_t image_logits;      // M * K
  Span tiles;
  Divisor cells;  // class first: H * W
  Layout layout;
  double scale;  // level weight times loss weight
};

struct Levels {
  int32_t count;
  Divisor classes;  // K
  int64_t images;
  int64_t tiles;
  Level level[kMaxLevels];
};

// A tile never leaves its image. The cut depends on the shapes alone, so the order of every sum does too. Image n starts at
// logit n * image_logits of the level; its first tile is shortened so that the others start at aligned positions.
struct Tile {
  int32_t level;
  int64_t image;
  int64_t aligned;     // where its grid of vectors starts; before `begin` in a shortened tile
  int64_t begin, end;  // logits within the image; possibly none
};

inline int64_t tiles_per_image(int64_t image_logits) {
  return image_logits == 0 ? 0 : (image_logits + kTileAlignment - 1 + kTileLogits - 1) / kTileLogits;
}

FASTFOCAL_HD Tile tile_at(const Levels& levels, int64_t index) {
  const Piece piece = piece_at(levels.count, [&](int l) { return levels.level[l].tiles; }, index);
  const int64_t image_logits = levels.level[piece.level].image_logits;
  Tile tile;
  tile.level = piece.level;
  tile.image = piece.image;
  tile.aligned = piece.index * kTileLogits - piece.image * image_logits % kTileAlignment;
  const int64_t end = tile.aligned + kTileLogits;
  tile.begin = tile.aligned < 0 ? 0 : tile.aligned;
  tile.end = end < image_logits ? end : image_logits;
  return tile;
}

// The anchor and the class of a tile's logits. Anchors are numbered as the packed labels are: class last, in the caller's order
// (h, w, a); class first, as [a][cell].
struct Place {
  int64_t anchor;
  int32_t k;
  int32_t cell;  // class first
};

struct TileMap {
  int64_t anchor;  // of the logit at tile.begin; class first: the first cell of its plane
  uint32_t k, cell;
  Divisor classes, cells;
  Layout layout;

  TileMap() = default;
  FASTFOCAL_HD TileMap(const Levels& levels, const Tile& tile)
      : classes(levels.classes), cells(levels.level[tile.level].cells), layout(levels.level[tile.level].layout) {
    if (layout == Layout::kClassLast) {
      anchor = tile.begin / classes.divisor;
      k = uint32_t(tile.begin - anchor * classes.divisor);
      cell = 0;
    } else {
      const int64_t plane = tile.begin / cells.divisor;  // a * K + k
      const int64_t a = plane / classes.divisor;
      cell = uint32_t(tile.begin - plane * cells.divisor);
      k = uint32_t(plane - a * classes.divisor);
      anchor = a * cells.divisor;
    }
  }

  // offset: from tile.begin, less than kTileLogits
  FASTFOCAL_HD Place at(uint32_t offset) const {
    if (layout == Layout::kClassLast) {
      const uint32_t n = k + offset;
      const uint32_t q = classes.of(n);
      return {anchor + q, int32_t(n - q * classes.divisor), 0};
    }
    const uint32_t n = cell + offset;
    const uint32_t planes = cells.of(n);
    const uint32_t m = k + planes;
    const uint32_t q = classes.of(m);
    const uint32_t c = n - planes * cells.divisor;
    return {anchor + int64_t(q) * cells.divisor + c, int32_t(m - q * classes.divisor), int32_t(c)};
  }
};

// ---------------------------------------------------------------------------------------------------------------------
// Tiles of whole anchors, for a loss that takes an anchor's classes together: a run of anchors as the labels are numbered, and
// class first of one anchor shape, whose cells they are. As many as make up kTileLogits; many classes make larger tiles.

constexpr int kMostAnchors = 512;  // of a tile
constexpr int kLeastCells = 64;    // class first: whole cache lines of each plane

struct AnchorTile {
  int32_t level;
  int64_t image;
  int64_t begin, end;  // anchors of the image
};

FASTFOCAL_HD int64_t anchors_per_tile(int64_t classes, Layout layout) {
  const bool rows = layout == Layout::kClassLast;
  const int64_t unit = rows ? 1 : kLeastCells, n = kTileLogits / classes / unit * unit;
  return n < unit ? unit : n > kMostAnchors ? kMostAnchors : n;
}

// Of the run that a tile may not leave: an image's anchors, or the cells of one anchor shape.
FASTFOCAL_HD int64_t run_of_anchors(const Level& level) {
  return level.layout == Layout::kClassLast ? level.anchors : int64_t(level.cells.divisor);
}

inline int64_t anchor_tiles_per_image(const Level& level, int64_t classes) {
  if (level.anchors == 0) return 0;
  const int64_t run = run_of_anchors(level), n = anchors_per_tile(classes, level.layout);
  return level.anchors / run * ((run + n - 1) / n);
}

FASTFOCAL_HD AnchorTile anchor_tile_at(const Levels& levels, int64_t index) {
  const Piece piece = piece_at(levels.count, [&](int l) { return levels.level[l].tiles; }, index);
  const Level& level = levels.level[piece.level];
  const int64_t run = run_of_anchors(level), n = anchors_per_tile(levels.classes.divisor, level.layout);
  const int64_t per_run = (run + n - 1) / n, which = piece.index / per_run;
  const int64_t base = which * run, begin = (piece.index - which * per_run) * n, end = begin + n;
  return {piece.level, piece.image, base + begin, base + (end < run ? end : run)};
}

// Where an anchor's own number lies, its loss or the gradient that comes in for it: in the caller's order, (h, w, a).
FASTFOCAL_HD int64_t anchor_position(const Level& level, int64_t anchor) {
  if (level.layout == Layout::kClassLast) return anchor;
  const int64_t cells = level.cells.divisor, a = anchor / cells;
  return (anchor - a * cells) * (level.anchors / cells) + a;
}

}  // namespace fastfocal
