// Which expert works on which tokens, in what order and with which of the two paths.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/int4_many.h"

namespace kimi::KIMI_ISA {

// Some of the tokens of one expert, the shared one included.
struct Segment {
  static constexpr int64_t kShared = -1;

  int64_t expert;        // local number
  int64_t first, count;  // places in the list of slots
  bool many;
  int64_t width;     // of its hidden layer
  int64_t x_at = 0;  // where its x and its hidden layer are in the group's workspace
  int64_t h_at = 0;

  int64_t panels() const { return (count + kPanel - 1) / kPanel; }
};

// The (token, expert) pairs in the order in which results are added: by expert, then by token; the
// shared expert last. Segments are cut into groups whose workspaces fit.
struct Plan {
  std::vector<int32_t> tokens;  // of each slot
  std::vector<float> weights;
  std::vector<Segment> segments;
  std::vector<int64_t> groups;  // first segment of each, and the end
};

// The path that all tokens take where a token's result must not depend on how many there are;
// either gives a token the same bits whatever stands beside it. With tiles a panel is cheap even
// for one token, without them it costs ten times the other path there.
#if defined(__AMX_BF16__)
inline constexpr bool kOnePathIsMany = true;
#else
inline constexpr bool kOnePathIsMany = false;
#endif

// Segments of one expert's slots first .. first + count.
inline void add_segments(Plan& plan, int64_t expert, int64_t first, int64_t count, int64_t width,
                         bool one_path) {
  constexpr int64_t kMost = 32 * kPanel;  // slots of a segment: bounds its workspace
  const bool many = one_path ? kOnePathIsMany : count > kFewTokens;
  for (int64_t at = 0; at < count; at += kMost) {
    plan.segments.push_back({expert, first + at, std::min(kMost, count - at), many, width});
  }
}

inline Plan make_plan(const int32_t* ids, const float* weights, int64_t tokens, int64_t choices,
                      int64_t experts, int64_t first_expert, int64_t width, int64_t shared_width,
                      bool one_path) {
  Plan plan;
  const int64_t pairs = width > 0 ? tokens * choices : 0;
  std::vector<int64_t> starts(static_cast<size_t>(experts) + 1);
  auto local = [&](int64_t pair) {
    const int64_t expert = ids[pair] - first_expert;
    return expert >= 0 && expert < experts ? expert : -1;
  };
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (const int64_t expert = local(pair); expert >= 0) ++starts[expert + 1];
  }
  for (int64_t e = 0; e < experts; ++e) starts[e + 1] += starts[e];
  const int64_t slots = starts[experts] + (shared_width > 0 ? tokens : 0);
  plan.tokens.resize(slots);
  plan.weights.resize(slots);
  std::vector<int64_t> next(starts);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const int64_t expert = local(pair);
    if (expert < 0) continue;
    const int64_t slot = next[expert]++;
    plan.tokens[slot] = static_cast<int32_t>(pair / choices);
    plan.weights[slot] = weights[pair];
  }
  for (int64_t e = 0; e < experts; ++e) {
    add_segments(plan, e, starts[e], starts[e + 1] - starts[e], width, one_path);
  }
  if (shared_width > 0) {
    for (int64_t token = 0; token < tokens; ++token) {
      plan.tokens[starts[experts] + token] = static_cast<int32_t>(token);
      plan.weights[starts[experts] + token] = 1.0f;
    }
    add_segments(plan, Segment::kShared, starts[experts], tokens, shared_width, one_path);
  }
  return plan;
}

// Places segments in a workspace of O, and cuts them into groups of at most 40 MiB, or of one
// segment where that alone is more. Returns the elements that the largest group needs.
template <class O>
inline int64_t place_segments(Plan& plan, int64_t depth) {
  constexpr int64_t kMost = (int64_t{40} << 20) / sizeof(O);
  int64_t used = 0, largest = 0;
  for (size_t i = 0; i < plan.segments.size(); ++i) {
    Segment& segment = plan.segments[i];
    const int64_t rows = segment.many ? segment.panels() * kPanel : segment.count;
    const int64_t size_x = segment.many ? depth : arranged_size<O>(depth);
    const int64_t hidden = (segment.width + kGroup - 1) / kGroup * kGroup;
    const int64_t size_h = segment.many ? hidden : arranged_size<O>(hidden);
    if (used > 0 && used + rows * (size_x + size_h) > kMost) used = 0;
    if (used == 0) plan.groups.push_back(static_cast<int64_t>(i));
    segment.x_at = used;
    segment.h_at = used + rows * size_x;
    used = segment.h_at + rows * size_h;
    largest = std::max(largest, used);
  }
  if (plan.groups.empty()) plan.groups.push_back(0);
  plan.groups.push_back(static_cast<int64_t>(plan.segments.size()));
  return largest;
}

}  // namespace kimi::KIMI_ISA
