// The names by which Python knows a layer's maps and counts.
#pragma once

#include <iterator>

#include "decoder.h"

namespace quicksilver {

struct Named {
  const char* name;
  int index;
};

inline constexpr Named kMapNames[] = {{"query", kQuery}, {"key", kKey}, {"value", kValue}, {"output", kOutput},
                                      {"gate", kGate},   {"up", kUp},   {"down", kDown}};
static_assert(std::size(kMapNames) == kMaps, "every map has a name");

// Of a layer's counts; "widths" are the first of [maps, widths].
inline constexpr Named kCountNames[] = {{"widths", kWidthCounts},
                                        {"query_rows", kQueryRows},
                                        {"fill_rows", kFillRows},
                                        {"asking_rows", kAskingRows},
                                        {"entries_read", kEntriesRead},
                                        {"pairs", kPairs},
                                        {"values_skipped", kValuesSkipped},
                                        {"scores_skipped", kScoresSkipped},
                                        {"scored_twice", kScoredTwice},
                                        {"past_mlp", kPastMlp},
                                        {"past_attention", kPastAttention},
                                        {"gated_mlp", kGatedMlp},
                                        {"gated_attention", kGatedAttention}};
static_assert(std::size(kCountNames) == 1 + kLayerCounts - kQueryRows, "every count has a name");

}  // namespace quicksilver
