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

// Of a layer's counts, in their order; what `Trace.counts` calls them too.
inline constexpr const char* kCountNames[] = {
    "macs_at_0",         "macs_at_1",   "macs_at_2",    "macs_at_3",    "macs_at_4",     "macs_at_5",
    "macs_at_6",         "macs_at_7",   "macs_at_8",    "query_rows",   "fill_rows",     "entries_read",
    "attended",          "values_skipped", "scores_skipped", "scored_twice", "skipped_mlp", "skipped_attention",
    "fitted_macs",       "fitted_bytes", "weight_bytes", "signal_entry", "signal_score", "signal_query"};
static_assert(std::size(kCountNames) == kLayerCounts, "every count has a name");

inline constexpr const char* kStageNames[] = {"norms", "inputs", "matrices", "entries", "attention"};
static_assert(std::size(kStageNames) == kStages, "every stage has a name");

}  // namespace quicksilver
