// Absorbed attention over the paged latent cache, for the ops that contain it.
//
//   score[t] = scale * q . kv[t],  out = sum_t softmax(score)[t] * kv[t, :C],  lse
//
// A sequence's tokens are cut into splits by its own length alone, and its S * H query rows into
// tiles of up to 128. An item is a split and a tile; a second region joins the splits of a tile,
// first to last, for one panel of columns an item. A sequence of one split is finished at once.
// Sequences are taken in turns of as many as kPartialBytes hold, so a result never depends on its
// neighbours nor on the number of threads.
#pragma once

#include "cpu/mla_split.h"

namespace kimi::KIMI_ISA {

inline constexpr int64_t kSplitKeys = 512;                   // of a split at least
inline constexpr int64_t kMostSplits = 32;                   // of a sequence
inline constexpr int64_t kPartialBytes = int64_t{32} << 20;  // of partial results at a time

// Tokens of a split of a sequence: what its length and the shape of a row's query ask for.
inline int64_t split_keys(const MlaCall& call, int64_t length) {
  const int64_t bytes = Partial::floats(call) * call.tiles() * 4;
  const int64_t splits = std::clamp<int64_t>(kPartialBytes / bytes, 1, kMostSplits);
  const int64_t keys = std::max((length + splits - 1) / splits, kSplitKeys);
  return (keys + kBlockKeys - 1) / kBlockKeys * kBlockKeys;
}

inline int64_t splits_of(const MlaCall& call, int64_t b) {
  const int64_t length = call.length(b), keys = split_keys(call, length);
  return std::max<int64_t>(1, (length + keys - 1) / keys);
}

// Joins the splits of a tile's rows for one panel of columns; with panel 0 their lse too, if asked
// for. `partials` are `stride` floats apart; `out` is the tile's first row.
template <class E>
void join_splits(E* out, float* lse, const MlaCall& call, float* partials, int64_t stride,
                 int64_t splits, int64_t rows, int64_t value_panel) {
  const int64_t columns = std::min<int64_t>(kPanel, call.cache.rank - value_panel * kPanel);
  auto part = [&](int64_t split) { return Partial::at(call, partials + split * stride); };
  alignas(64) float weights[kMostSplits * kPanel];
  for (int64_t first = 0; first < rows; first += kPanel) {
    const Softmax all = join(
        splits,
        [&](int64_t split) -> const Softmax& { return part(split).softmax[first / kPanel]; },
        weights);
    for (int64_t i = 0; i < std::min<int64_t>(kPanel, rows - first); ++i) {
      const int64_t row = first + i, at = (value_panel * call.tile_rows() + row) * kPanel;
      F sums[kPanel / W] = {};
      for (int64_t split = 0; split < splits; ++split) {
        const float weight = weights[split * kPanel + i];
        for (int j = 0; j < kPanel / W; ++j) {
          sums[j] += load(part(split).sums + at + j * W) * weight;
        }
      }
      for_each_piece(columns, [&](int64_t j, auto n) {
        store_piece(out + row * call.cache.rank + value_panel * kPanel + j, sums[j / W], n);
      });
      if (lse && value_panel == 0) lse[row] = all.lse(i);
    }
  }
}

// Calls body(b, tile, split, splits, place) for the items of sequences first .. last - 1; place
// counts partial results.
class MlaItems {
 public:
  MlaItems(const MlaCall& call, int64_t first, int64_t most)
      : call_(call), first_(first), ends_(call.batch - first + 1) {
    ends_[0] = 0;
    for (last_ = first; last_ < call.batch; ++last_) {
      const int64_t items = splits_of(call, last_) * call.tiles();
      const int64_t end = ends_[last_ - first] + items;
      if (last_ > first && end > most) break;
      ends_[last_ - first + 1] = end;
    }
  }
  int64_t last() const { return last_; }
  int64_t count() const { return ends_[last_ - first_]; }
  int64_t start(int64_t b) const { return ends_[b - first_]; }
  int64_t sequence(int64_t item) const {
    return first_ + (std::upper_bound(&ends_[0], &ends_[last_ - first_], item) - &ends_[0]) - 1;
  }

 private:
  const MlaCall& call_;
  const int64_t first_;
  int64_t last_;
  Buffer<int64_t> ends_;
};

// out [B, S, H, C] and lse [B, S, H], dense; no lse if it is null.
template <class E>
void attend(const kimi_team* team, E* out, float* lse, const MlaCall& call) {
  const int64_t stride = Partial::floats(call), tiles = call.tiles();
  const int64_t panels = call.value_panels();
  auto rows_of = [&](int64_t tile) {
    return std::min(call.tile_rows(), call.rows() - tile * call.tile_rows());
  };
  auto finish = [&](int64_t b, int64_t tile, float* partials, int64_t splits, int64_t panel) {
    const int64_t row = b * call.rows() + tile * call.tile_rows();
    join_splits(out + row * call.cache.rank, lse ? lse + row : nullptr, call, partials, stride,
                splits, rows_of(tile), panel);
  };
  for (int64_t first = 0; first < call.batch;) {
    const MlaItems items(call, first, kPartialBytes / (4 * stride));
    const bool joins = items.count() > (items.last() - first) * tiles;
    Buffer<float> partials(joins ? items.count() * stride : 0);
    run_items(team, items.count(), [&](Items& taken) {
      Tiles tile_registers;
      MlaWorkspace<E> work(call);
      Buffer<float> own(stride);
      for (int64_t item; taken.take(item);) {
        // Tiles of a split are neighbours: the second one finds the tokens in the cache.
        const int64_t b = items.sequence(item), splits = splits_of(call, b);
        const int64_t split = (item - items.start(b)) / tiles,
                      tile = (item - items.start(b)) % tiles;
        float* place =
            splits == 1 ? own.get() : &partials[(items.start(b) + tile * splits + split) * stride];
        const int64_t keys = split_keys(call, call.length(b));
        attend_split(Partial::at(call, place), work, call, b, tile * call.tile_rows(),
                     rows_of(tile), split * keys, std::min(call.length(b), (split + 1) * keys));
        if (splits > 1) continue;
        for (int64_t panel = 0; panel < panels; ++panel) finish(b, tile, place, 1, panel);
      }
    });
    if (joins) {
      for_each_item(team, (items.last() - first) * tiles * panels, [&](int64_t item) {
        const int64_t b = first + item / (tiles * panels), tile = item / panels % tiles;
        const int64_t splits = splits_of(call, b);
        if (splits == 1) return;
        finish(b, tile, &partials[(items.start(b) + tile * splits) * stride], splits,
               item % panels);
      });
    }
    first = items.last();
  }
}

}  // namespace kimi::KIMI_ISA
