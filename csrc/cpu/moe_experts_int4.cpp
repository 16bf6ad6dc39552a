// y[t] = sum over k of weights[t, k] * down(silu(gate(x[t])) * up(x[t])) of expert ids[t, k], and
// the shared expert's, on int4 weights as the checkpoint stores them.
//
// Three regions over a group of experts (one group, unless the tokens are thousands):
//
//   arrange   x of each expert's tokens in the form that its path reads
//   gate_up   items of 32 hidden columns of an expert: gate and up rows together, SwiGLU, h
//   down      items of 64 output columns, each through all experts in ascending order, summed in
//             float32: no two threads add to one number, and the order is always the same
//
// An expert with few tokens is bound by memory: its weights are unpacked in registers and meet each
// token's x there (int4.h). With more tokens its weights are unpacked into the cache, 32 rows at a
// time, and multiplied with panels of 32 tokens (int4_many.h). Weights are read once per call.
//
// Bytes: the chosen experts' weights and scales, 24.8 MB each in Kimi K2.5. FLOP: 6 * tokens *
// choices * depth * width.
#include "cpu/moe_experts_int4_call.h"
#include "cpu/moe_experts_int4_plan.h"
#include "cpu/parallel.h"

namespace kimi::KIMI_ISA {
namespace {

template <class E>
class Experts {
  using O = Int4Operand<E>;

 public:
  Experts(const kimi_team* team, const Call<E>& call, Plan& plan)
      : team_(team),
        call_(call),
        plan_(plan),
        workspace_(place_segments<O>(plan, call.depth)),
        total_(call.tokens * call.depth) {}

  void run() {
    for (size_t group = 0; group + 1 < plan_.groups.size(); ++group) {
      const Segment* first = plan_.segments.data() + plan_.groups[group];
      const Segment* last = plan_.segments.data() + plan_.groups[group + 1];
      arrange_all(first, last);
      gate_up(first, last);
      down(first, last, group == 0, group + 2 == plan_.groups.size());
    }
  }

 private:
  // Of an item: hidden columns by path, tiles of 16; and output columns, tiles of 32.
  static int64_t item_hidden(const Segment& s) { return s.many ? 128 : 32; }
  static int64_t item_columns(bool many) { return many ? 256 : 64; }
  static constexpr int64_t kTiles = 8;  // the most that an item has

  // A unit of work within a segment.
  struct Item {
    const Segment* segment;
    int64_t at;
  };

  static std::vector<Item> items_of(const Segment* first, const Segment* last, auto&& count) {
    std::vector<Item> items;
    for (const Segment* segment = first; segment != last; ++segment) {
      for (int64_t at = 0; at < count(*segment); ++at) items.push_back({segment, at});
    }
    return items;
  }

  O* x_of(const Segment& s, int64_t slot) const {
    const int64_t size = s.many ? call_.depth : arranged_size<O>(call_.depth);
    return workspace_.get() + s.x_at + slot * size;
  }
  static int64_t hidden_depth(const Segment& s) { return (s.width + kGroup - 1) / kGroup * kGroup; }
  O* h_of(const Segment& s, int64_t slot) const {
    const int64_t size = s.many ? hidden_depth(s) : arranged_size<O>(hidden_depth(s));
    return workspace_.get() + s.h_at + slot * size;
  }

  // An item is a panel of tokens, or a token. The shared expert's rows take x as it is.
  void arrange_all(const Segment* first, const Segment* last) {
    const auto items = items_of(first, last, [](const Segment& s) {
      return s.many ? s.panels() : s.expert == Segment::kShared ? 0 : s.count;
    });
    for_each_item(team_, static_cast<int64_t>(items.size()), [&](int64_t i) {
      const auto& [segment, at] = items[i];
      const int32_t* tokens = plan_.tokens.data() + segment->first;
      if (segment->many) {
        const int64_t slot = at * kPanel;
        pack_tokens(x_of(*segment, slot), call_.x, call_.stride_x, tokens + slot,
                    std::min<int64_t>(kPanel, segment->count - slot), call_.depth);
      } else {
        arrange(x_of(*segment, at), call_.x + tokens[at] * call_.stride_x, call_.depth);
        O* h = h_of(*segment, at);
        std::fill(h, h + arranged_size<O>(segment->width), O{});
      }
    });
  }

  void gate_up(const Segment* first, const Segment* last) {
    const auto items = items_of(first, last, [](const Segment& s) {
      return (s.width + item_hidden(s) - 1) / item_hidden(s);
    });
    int64_t most = 0;
    for (const Segment* s = first; s != last; ++s) most = std::max(most, s->many * s->panels());
    run_items(team_, static_cast<int64_t>(items.size()), [&](Items& queue) {
      const Tiles tiles;
      Buffer<float> scales(kTiles * kTileRows * (call_.depth / kGroup));
      Buffer<float> results(kTiles * most * kTileSize);
      Buffer<O> scratch(most > 0 ? kScratch : 0);
      for (int64_t i; queue.take(i);) {
        const auto& [segment, at] = items[i];
        const int64_t hidden = item_hidden(*segment), f = at * hidden;
        if (segment->many) {
          gate_up_many(*segment, f, std::min(f + hidden, hidden_depth(*segment)), results.get(),
                       scratch.get(), scales.get());
        } else {
          gate_up_few(*segment, f, std::min(f + hidden, segment->width), scales.get());
        }
      }
    });
  }

  void gate_up_few(const Segment& s, int64_t first, int64_t last, float* scales) {
    const int32_t* tokens = plan_.tokens.data() + s.first;
    if (s.expert == Segment::kShared) {
      const E* rows = call_.shared_gate_up;
      for (int64_t f = first; f < last; ++f) {
        for (int64_t t = 0; t < s.count; ++t) {
          const E* x = call_.x + tokens[t] * call_.stride_x;
          const int64_t stride = call_.stride_shared_gate_up;
          const float gate = dot_dense(rows + f * stride, x, call_.depth);
          const float up = dot_dense(rows + (s.width + f) * stride, x, call_.depth);
          h_of(s, t)[f] = narrow<O>(silu_times(gate, up));
        }
      }
      return;
    }
    const Int4Rows rows = call_.gate_up_of(s.expert);
    for_few(s.count, [&]<int T>(std::integral_constant<int, T>, int64_t from) {
      const O* x[T];
      for (int t = 0; t < T; ++t) x[t] = x_of(s, from + t);
      // Columns of the item's parts side by side, so that each part is read from front to back.
      for_parts<kRowsTogether<T> / 2>(first, last, [&]<int P>(const int64_t (&f)[P]) {
        int64_t gates_and_ups[2 * P];
        for (int p = 0; p < P; ++p) {
          gates_and_ups[p] = f[p];
          gates_and_ups[P + p] = s.width + f[p];
        }
        float products[2 * P][T];
        dot_rows<2 * P, T>(products, rows, gates_and_ups, x, scales);
        for (int t = 0; t < T; ++t) {
          for (int p = 0; p < P; ++p) {
            h_of(s, from + t)[arranged_position<O>(f[p])] =
                narrow<O>(silu_times(products[p][t], products[P + p][t]));
          }
        }
      });
    });
  }

  // Of 16 hidden columns the gate rows and the up rows are the 32 of a tile.
  void gate_up_many(const Segment& s, int64_t begin, int64_t end, float* results, O* scratch,
                    float* scales) {
    const bool shared = s.expert == Segment::kShared;
    const Int4Rows rows = shared ? Int4Rows{} : call_.gate_up_of(s.expert);
    const int64_t tiles = (end - begin) / 16;
    auto row_of = [&](int64_t tile, int64_t r) {
      return (r < 16 ? 0 : s.width) + begin + tile * 16 + r % 16;
    };
    auto scales_of = [&](int64_t tile, int64_t r) {
      return scales + (tile * kTileRows + r) * rows.groups;
    };
    for (int64_t tile = 0; tile < tiles && !shared; ++tile) {
      for (int64_t r = 0; r < kTileRows; ++r) rows.scales(scales_of(tile, r), row_of(tile, r));
    }
    auto fill = [&](O* to, int64_t stride_row, int64_t stride_group, int64_t tile, int64_t first,
                    int64_t last) {
      for (int64_t r = 0; r < kTileRows && !shared; r += 16) {
        unpack_rows(to + r * stride_row, stride_row, stride_group, rows, row_of(tile, r), 16, first,
                    last, scales_of(tile, r), tile + 1 < tiles ? row_of(tile + 1, r) : -1);
      }
      for (int64_t r = 0; r < kTileRows && shared; ++r) {
        // A column past the width has no row: one of no columns.
        const int64_t width = begin + tile * 16 + r % 16 < s.width ? call_.depth : 0;
        unpack_dense(to + r * stride_row, stride_group,
                     call_.shared_gate_up + row_of(tile, r) * call_.stride_shared_gate_up, first,
                     last, width);
      }
    };
    multiply_panels(results, x_of(s, 0), s.count, call_.depth, tiles, scratch, fill);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t p = 0; p < s.panels(); ++p) {
        const float* c = results + (tile * s.panels() + p) * kTileSize;
        pack_sixteen(h_of(s, p * kPanel), begin + tile * 16, [&](int row, int column) {
          const F gate = load(c + row * kPanel + column);
          return silu(gate) * load(c + (16 + row) * kPanel + column);
        });
      }
    }
  }

  void down(const Segment* first, const Segment* last, bool is_first, bool is_last) {
    int64_t most = 0, widest = 0;
    for (const Segment* s = first; s != last; ++s) {
      most = std::max(most, s->many * s->panels());
      widest = std::max(widest, hidden_depth(*s));
    }
    const int64_t columns = item_columns(most > 0);
    const int64_t items = (call_.depth + columns - 1) / columns;
    run_items(team_, items, [&](Items& queue) {
      const Tiles tiles;
      Buffer<float> scales(kTiles * kTileRows * (widest / kGroup));
      Buffer<float> results((kTiles * most + 1) * kTileSize);
      Buffer<O> scratch(most > 0 ? kScratch : 0);
      for (int64_t i; queue.take(i);) {
        const int64_t d = i * columns, end = std::min(d + columns, call_.depth);
        if (is_first) {
          for (int64_t t = 0; t < call_.tokens; ++t) {
            std::fill(&total_[t * call_.depth + d], &total_[t * call_.depth + d] + (end - d), 0.0f);
          }
        }
        for (const Segment* s = first; s != last; ++s) {
          if (s->many) {
            down_many(*s, d, end, results.get(), scratch.get(), scales.get());
          } else {
            down_few(*s, d, end, scales.get());
          }
        }
        if (is_last) {
          for (int64_t t = 0; t < call_.tokens; ++t) {
            const float* from = &total_[t * call_.depth + d];
            E* to = call_.y + t * call_.depth + d;
            for_each_piece(end - d, [&](int64_t j, auto n) {
              store_piece(to + j, load_piece(from + j, n), n);
            });
          }
        }
      }
    });
  }

  float& total_of(const Segment& s, int64_t slot, int64_t d) {
    return total_[plan_.tokens[s.first + slot] * call_.depth + d];
  }

  void down_few(const Segment& s, int64_t first, int64_t last, float* scales) {
    const float* weights = plan_.weights.data() + s.first;
    if (s.expert == Segment::kShared) {
      for (int64_t d = first; d < last; ++d) {
        const E* row = call_.shared_down + d * call_.stride_shared_down;
        for (int64_t t = 0; t < s.count; ++t) {
          total_of(s, t, d) += dot_dense(row, h_of(s, t), s.width);
        }
      }
      return;
    }
    const Int4Rows rows = call_.down_of(s.expert);
    for_few(s.count, [&]<int T>(std::integral_constant<int, T>, int64_t from) {
      const O* h[T];
      for (int t = 0; t < T; ++t) h[t] = h_of(s, from + t);
      for_parts<kRowsTogether<T>>(first, last, [&]<int P>(const int64_t (&d)[P]) {
        float products[P][T];
        dot_rows<P, T>(products, rows, d, h, scales);
        for (int t = 0; t < T; ++t) {
          for (int p = 0; p < P; ++p) {
            total_of(s, from + t, d[p]) += weights[from + t] * products[p][t];
          }
        }
      });
    });
  }

  void down_many(const Segment& s, int64_t begin, int64_t end, float* results, O* scratch,
                 float* scales) {
    const bool shared = s.expert == Segment::kShared;
    const Int4Rows rows = shared ? Int4Rows{} : call_.down_of(s.expert);
    const int64_t tiles = (end - begin) / kTileRows;
    for (int64_t r = 0; r < end - begin && !shared; ++r) {
      rows.scales(scales + r * rows.groups, begin + r);
    }
    auto fill = [&](O* to, int64_t stride_row, int64_t stride_group, int64_t tile, int64_t first,
                    int64_t last) {
      const int64_t row = begin + tile * kTileRows;
      if (!shared) {
        unpack_rows(to, stride_row, stride_group, rows, row, kTileRows, first, last,
                    scales + tile * kTileRows * rows.groups,
                    tile + 1 < tiles ? row + kTileRows : -1);
        return;
      }
      for (int64_t r = 0; r < kTileRows; ++r) {
        unpack_dense(to + r * stride_row, stride_group,
                     call_.shared_down + (row + r) * call_.stride_shared_down, first, last,
                     s.width);
      }
    };
    multiply_panels(results, h_of(s, 0), s.count, hidden_depth(s), tiles, scratch, fill);
    float* turned = results + tiles * s.panels() * kTileSize;
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t p = 0; p < s.panels(); ++p) {
        transpose_words(
            reinterpret_cast<uint32_t*>(turned),
            reinterpret_cast<const uint32_t*>(results + (tile * s.panels() + p) * kTileSize),
            kPanel, kTileRows, kPanel);
        for (int64_t slot = p * kPanel; slot < std::min(s.count, (p + 1) * kPanel); ++slot) {
          const F weight = splat(plan_.weights[s.first + slot]);
          float* to = &total_of(s, slot, begin + tile * kTileRows);
          const float* from = turned + slot % kPanel * kPanel;
          for (int j = 0; j < kTileRows; j += W) {
            store(to + j, load(to + j) + weight * load(from + j));
          }
        }
      }
    }
  }

  const kimi_team* team_;
  const Call<E>& call_;
  const Plan& plan_;
  Buffer<O> workspace_;
  Buffer<float> total_;  // [tokens, depth]
};

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(moe_experts_int4)(
    const kimi_team* team, int64_t dtype, void* y, const void* x, const void* gate_up_packed,
    const void* gate_up_scale, const void* down_packed, const void* down_scale,
    const float* weights, const int32_t* ids, const void* shared_gate_up, const void* shared_down,
    int64_t tokens, int64_t depth, int64_t width, int64_t experts, int64_t choices,
    int64_t shared_width, int64_t first_expert, int64_t stride_x, int64_t stride_gate_up_e,
    int64_t stride_gate_up, int64_t stride_gate_up_scale_e, int64_t stride_gate_up_scale,
    int64_t stride_down_e, int64_t stride_down, int64_t stride_down_scale_e,
    int64_t stride_down_scale, int64_t stride_shared_gate_up, int64_t stride_shared_down,
    int64_t scale_dtype, int64_t one_path) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    Plan plan = make_plan(ids, weights, tokens, choices, experts, first_expert, width, shared_width,
                          one_path != 0);
    with_element(dtype, [&](auto element) {
      using E = decltype(element);
      const Call<E> call = {
          .y = static_cast<E*>(y),
          .x = static_cast<const E*>(x),
          .stride_x = stride_x,
          .tokens = tokens,
          .depth = depth,
          .gate_up = {static_cast<const uint32_t*>(gate_up_packed), stride_gate_up, gate_up_scale,
                      stride_gate_up_scale, scale_dtype, depth / kGroup},
          .down = {static_cast<const uint32_t*>(down_packed), stride_down, down_scale,
                   stride_down_scale, scale_dtype, width / kGroup},
          .stride_gate_up_e = stride_gate_up_e,
          .stride_gate_up_scale_e = stride_gate_up_scale_e,
          .stride_down_e = stride_down_e,
          .stride_down_scale_e = stride_down_scale_e,
          .shared_gate_up = static_cast<const E*>(shared_gate_up),
          .shared_down = static_cast<const E*>(shared_down),
          .stride_shared_gate_up = stride_shared_gate_up,
          .stride_shared_down = stride_shared_down,
      };
      Experts<E>(team, call, plan).run();
    });
  });
}
