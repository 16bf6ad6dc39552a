// Rotates q and k of every patch in place: pair 2i by column * p_i, pair 2i + 1 by row * p_i,
// p_i = 10000^(-4i / head_dim), angles in float32.
//
// Cosines and sines of all positions up to kTabled are taken first, each angle twice over (four
// elements), so that a patch's are those of its column in every other pair and those of its row in
// the others. They serve all heads of q and k: as many heads side by side as fill whole vectors,
// where the heads are dense. An item is a few patches. Bound by memory: q and k are read and
// written.
#include <cmath>

#include "cpu/grid.h"
#include "cpu/rotate.h"

namespace kimi::KIMI_ISA {
namespace {

constexpr int64_t kTabled = 1024;

// Cosines and sines of positions, each angle for the four elements of two neighbouring pairs.
class Turns {
 public:
  Turns(int64_t head_dim, int64_t repeats, int64_t positions)
      : positions_(positions),
        pairs_(repeats * head_dim / 2),
        size_(turns_size(pairs_)),
        frequency_(pairs_),
        table_(2 * size_ * positions) {
    for (int64_t i = 0; i < pairs_; ++i) {
      const double exponent =
          -4.0 * static_cast<double>(i % (head_dim / 2) / 2) / static_cast<double>(head_dim);
      frequency_[i] = static_cast<float>(std::pow(10000.0, exponent));
    }
    for (int64_t p = 0; p < positions; ++p) fill(table_.get() + 2 * size_ * p, p);
  }

  int64_t size() const { return size_; }  // of cosines; as many sines follow

  // Of a position; in `own`, of 2 * size elements, where the table has none.
  const float* at(int64_t position, float* own) const {
    if (position < positions_) return table_.get() + 2 * size_ * position;
    fill(own, position);
    return own;
  }

 private:
  void fill(float* to, int64_t position) const {
    turns(to, to + size_, static_cast<float>(position), frequency_.get(), pairs_);
  }

  const int64_t positions_, pairs_, size_;
  const Buffer<float> frequency_;
  const Buffer<float> table_;
};

template <class E>
struct Call {
  E* qkv;  // [patches, 3, heads, head_dim]
  int64_t stride_patch, stride_part, stride_head;
  int64_t heads, head_dim;
  int64_t repeats;  // heads side by side that fill whole vectors; 1 if heads are apart

  // Cosines of a patch, or its sines: from its column, and from its row in every other pair.
  static void join(float* to, const float* column, const float* row, int64_t size) {
    I odd_pair;
    for (int lane = 0; lane < W; ++lane) odd_pair[lane] = lane & 2 ? -1 : 0;
    for (int64_t i = 0; i < size; i += W) {
      store(to + i, odd_pair ? load(row + i) : load(column + i));
    }
  }

  void rotate(E* x, const float* cosines, const float* sines, int64_t width, int64_t ahead) const {
    for_each_piece(width, [&](int64_t i, auto n) {
      if (ahead != 0) __builtin_prefetch(x + ahead + i);
      store_piece(x + i, rotated(x + i, cosines + i, sines + i, n), n);
    });
  }

  void rotate_patch(int64_t patch, const float* cosines, const float* sines, int64_t ahead) const {
    for (int64_t part = 0; part < 2; ++part) {
      E* x = qkv + patch * stride_patch + part * stride_part;
      int64_t head = 0;
      for (; head + repeats <= heads; head += repeats) {
        rotate(x + head * stride_head, cosines, sines, repeats * head_dim, ahead);
      }
      if (head < heads)
        rotate(x + head * stride_head, cosines, sines, (heads - head) * head_dim, ahead);
    }
  }

  void run(const kimi_team* team, const Grid& grid) const {
    int64_t positions = 0;
    for (const Entry& entry : grid) positions = std::max({positions, entry.h, entry.w});
    const Turns turns(head_dim, repeats, std::min({positions, grid.patches(), kTabled}));
    const int64_t at_once = 1 + 8192 / (2 * heads * head_dim);
    run_items(team, (grid.patches() + at_once - 1) / at_once, [&](Items& items) {
      const Buffer<float> own(4 * turns.size()), joined(2 * turns.size());
      float *own_row = own.get() + 2 * turns.size(), *sines = joined.get() + turns.size();
      for (int64_t item; items.take(item);) {
        const int64_t last = std::min(grid.patches(), (item + 1) * at_once);
        for (int64_t patch = item * at_once; patch < last; ++patch) {
          const Entry& entry = grid.of_item(patch);
          const int64_t place = patch - entry.start;
          const float* column = turns.at(place % entry.w, own.get());
          const float* row = turns.at(place / entry.w % entry.h, own_row);
          join(joined.get(), column, row, turns.size());
          join(sines, column + turns.size(), row + turns.size(), turns.size());
          rotate_patch(patch, joined.get(), sines, patch + 1 < last ? stride_patch : 0);
        }
      }
    });
  }
};

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(vision_rope)(const kimi_team* team, int64_t dtype, void* qkv,
                                      int64_t stride_patch, int64_t stride_part,
                                      int64_t stride_head, const void* grid_thws,
                                      int64_t grid_bytes, int64_t entries, int64_t length,
                                      int64_t heads, int64_t head_dim) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    // An entry's items are its patches.
    const Grid grid({grid_thws, grid_bytes}, entries, length, [&](const Entry& entry) {
      return std::min(entry.t * entry.h * entry.w, length - entry.start);
    });
    int64_t repeats = 1;
    while (stride_head == head_dim && repeats * head_dim % W != 0) ++repeats;
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      Call<E>{
          static_cast<E*>(qkv), stride_patch, stride_part, stride_head, heads, head_dim, repeats}
          .run(team, grid);
    });
  });
}
