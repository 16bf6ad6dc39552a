// weights, ids = the experts of each token: gate product (gate.h), then the choice (select.h),
// then, if asked for, the tables of the pairs by expert (expert_sort.h).
//
//   one token   items are 8 experts; the calling thread chooses
//   up to 128   panels of x are packed, items are 32 experts, then items are 16 tokens
//   more        items are 128 tokens: packed chunk by chunk, multiplied, chosen for
//
// A token's logits are the same in both of the latter, and in batch-invariant mode the first is not
// taken. Bytes: the weight, once per 128 tokens; 2 * D * E operations a token.
#include "cpu/expert_sort.h"
#include "cpu/gate.h"
#include "cpu/select.h"

namespace kimi::KIMI_ISA {
namespace {

struct Chosen {
  const Selection& selection;
  float* weights;  // [tokens, top_k]
  int32_t* ids;    // [tokens, top_k]

  void choose(const float* logits, int64_t token) const {
    const int64_t at = token * selection.top_k;
    selection.choose(logits, weights + at, ids + at);
  }

  // For the tokens of W neighbouring columns from `column` on of a panel of logits[experts][32].
  void choose_columns(const float* logits, int64_t token, int64_t column, int64_t tokens,
                      float* own) const {
    const int64_t experts = selection.experts, width = (experts + W - 1) / W * W;
    for (int64_t e = 0; e < experts; e += W) {
      U block[W] = {};
      for (int64_t r = 0; r < std::min<int64_t>(W, experts - e); ++r) {
        block[r] = (U)load(logits + (e + r) * kPanel + column);
      }
      transpose(block);
      for (int64_t r = 0; r < W; ++r) store(own + r * width + e, (F)block[r]);
    }
    for (int64_t r = 0; r < std::min<int64_t>(W, tokens - token); ++r)
      choose(own + r * width, token + r);
  }
};

int64_t token_major_size(int64_t experts) { return W * ((experts + W - 1) / W * W); }

void route_one(const kimi_team* team, const Gate& gate, const Chosen& chosen) {
  constexpr int64_t kExperts = 8;  // of an item
  const Buffer<float> x(gate.depth);
  float logits[kMostExperts];
  copy_rows(x.get(), gate.depth, gate.dtype_x, gate.x, 0, gate.stride_x, 1, gate.depth);
  for_each_range(team, gate.experts, kExperts, [&](int64_t first, int64_t last) {
    multiply_one(logits, gate, x.get(), first, last);
  });
  chosen.choose(logits, 0);
}

template <class O>
void route_some(const kimi_team* team, const Gate& gate, const Chosen& chosen) {
  constexpr int64_t kExperts = 32;  // of an item
  const int64_t panels = (gate.tokens + kPanel - 1) / kPanel;
  const int64_t chunks = (gate.depth + kChunk - 1) / kChunk, size = kChunk * kPanel;
  const Buffer<O> packed(panels * chunks * size);
  const Buffer<float> logits(panels * gate.experts * kPanel);
  run_items(team, panels * chunks, [&](Items& items) {
    GateProduct<O> product(gate);
    for (int64_t item; items.take(item);) {
      product.pack(packed.get() + item * size, item / chunks * kPanel, item % chunks * kChunk);
    }
  });
  run_items(team, (gate.experts + kExperts - 1) / kExperts, [&](Items& items) {
    GateProduct<O> product(gate);
    for (int64_t item; items.take(item);) {
      const int64_t first = item * kExperts, rows = std::min(kExperts, gate.experts - first);
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        product.multiply_chunk(logits.get(), packed.get() + chunk * size, chunks * size, panels,
                               first, rows, chunk * kChunk);
      }
    }
  });
  run_items(team, (gate.tokens + W - 1) / W, [&](Items& items) {
    const Buffer<float> own(token_major_size(gate.experts));
    for (int64_t item; items.take(item);) {
      const int64_t token = item * W, panel = token / kPanel;
      chosen.choose_columns(logits.get() + panel * gate.experts * kPanel, token, token % kPanel,
                            gate.tokens, own.get());
    }
  });
}

template <class O>
void route_many(const kimi_team* team, const Gate& gate, const Chosen& chosen) {
  constexpr int64_t kTokens = kTokenPanels * kPanel, kSize = kChunk * kPanel;
  run_items(team, (gate.tokens + kTokens - 1) / kTokens, [&](Items& items) {
    GateProduct<O> product(gate);
    const Buffer<O> packed(kTokenPanels * kSize);
    const Buffer<float> logits(kTokenPanels * gate.experts * kPanel);
    const Buffer<float> own(token_major_size(gate.experts));
    for (int64_t item; items.take(item);) {
      const int64_t first = item * kTokens, last = std::min(gate.tokens, first + kTokens);
      const int64_t panels = (last - first + kPanel - 1) / kPanel;
      for (int64_t k0 = 0; k0 < gate.depth; k0 += kChunk) {
        for (int64_t p = 0; p < panels; ++p)
          product.pack(packed.get() + p * kSize, first + p * kPanel, k0);
        for (int64_t e = 0; e < gate.experts; e += kGateRows) {
          product.multiply_chunk(logits.get(), packed.get(), kSize, panels, e,
                                 std::min(kGateRows, gate.experts - e), k0);
        }
      }
      for (int64_t token = first; token < last; token += W) {
        const int64_t panel = (token - first) / kPanel;
        chosen.choose_columns(logits.get() + panel * gate.experts * kPanel, token,
                              (token - first) % kPanel, last, own.get());
      }
    }
  });
}

template <class O>
void route(const kimi_team* team, const Gate& gate, const Chosen& chosen) {
  const bool fits = gate.tokens <= kTokenPanels * kPanel && gate.tokens * gate.depth <= 4 << 20;
  if (fits) {
    route_some<O>(team, gate, chosen);
  } else {
    route_many<O>(team, gate, chosen);
  }
}

}  // namespace
}  // namespace kimi::KIMI_ISA

extern "C" int KIMI_NAME(moe_route)(const kimi_team* team, int64_t dtype_x, int64_t dtype_weight,
                                    float* weights, int32_t* ids, int32_t* order, int32_t* offsets,
                                    int64_t first, int64_t local, const void* x, int64_t stride_x,
                                    const void* gate_weight, int64_t stride_weight,
                                    const float* bias, int64_t tokens, int64_t depth,
                                    int64_t experts, int64_t top_k, int64_t n_group,
                                    int64_t topk_group, float scale, int64_t normalize,
                                    int64_t batch_invariant) {
  using namespace kimi::KIMI_ISA;
  return entry([&] {
    const Gate gate{dtype_x,       dtype_weight, x,     gate_weight, stride_x,
                    stride_weight, tokens,       depth, experts};
    const Selection selection{bias, experts, top_k, n_group, topk_group, scale, normalize != 0};
    const Chosen chosen{selection, weights, ids};
    if (tokens == 0 || depth == 0) {
      const float zeros[kMostExperts] = {};
      for (int64_t t = 0; t < tokens; ++t) chosen.choose(zeros, t);
    } else if (tokens == 1 && batch_invariant == 0) {
      route_one(team, gate, chosen);
    } else if (dtype_x == KIMI_BF16 && dtype_weight == KIMI_BF16) {
      route<bf16>(team, gate, chosen);
    } else {
      route<float>(team, gate, chosen);
    }
    if (offsets != nullptr) {
      sort_by_expert(order, offsets, ids, {1, top_k, 0}, tokens, top_k, first, local);
    }
  });
}
