// Whole decoder layers over a few rows: norms, projections, attention over the cache, the MLP, shortcuts past either.
// Which rows run, who halts and what is counted is decided on the Python side.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "floats.h"
#include "matrix.h"
#include "product.h"
#include "stages.h"

namespace quicksilver {

// A linear map, and how its bits are chosen.
struct LinearMap {
  const Matrix* matrix = nullptr;
  const float* bias = nullptr;  // [out]; the mean's product included
  const float* mean = nullptr;  // [in], taken from the input first
  std::array<std::int64_t, kMaxBits + 1> channel_bytes{};  // of a channel read at each number of bits
  int bits = kMaxBits;  // of rows that are not protected, where nothing below is given
  std::vector<float> thresholds;
  std::vector<std::uint8_t> levels;  // empty where bits are uniform
  const float* norms = nullptr;      // [in]; null where |x| alone is the score

  // Whether channels of one input are read alike for both.
  bool decides_like(const LinearMap& other) const {
    return mean == other.mean && thresholds == other.thresholds && levels == other.levels && norms == other.norms &&
           (!levels.empty() || bits == other.bits);
  }
};

// Maps of one input whose codes lie side by side, so that one product makes them all.
struct JoinedMaps {
  const Matrix* matrix = nullptr;  // null where there are none
  std::vector<float> bias;         // [outputs]; empty for none
};

// x @ weight + bias, or x @ down @ up + bias; both row-major.
struct AffineMap {
  const float* down = nullptr;  // [in, rank], null where the map is full
  const float* up = nullptr;    // [rank or in, out]
  const float* bias = nullptr;  // [out]
  int rank = 0;
};

// A fitted map that stands in for a sublayer, where a gate predicts a small error or, without one, always.
struct Shortcut {
  bool present = false;
  AffineMap map;
  const float* gate = nullptr;  // [d + 2]
  float log_threshold = 0.0f;
};

enum MapIndex { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kMaps };  // a plain MLP has no kGate

struct Layer {
  Norm attention_norm{}, mlp_norm{};            // a norm's weight is null where there is none
  Norm attention_post_norm{}, mlp_post_norm{};  // of what a sublayer adds
  Norm query_norm{}, key_norm{};
  bool norms_projections = false;  // these two norm all heads together
  float residual_scale = 1.0f;     // factor of what a sublayer adds
  int window = 0;                  // keys that a query may see, by their positions; 0: all
  const float* key_centre = nullptr;  // [kv_heads, head_dim] that keys are kept less of; null for nothing
  int rotary = -1;                 // which of the rotations of a run; -1: none
  LinearMap maps[kMaps];
  JoinedMaps attention_input, mlp_input;  // of query, key and value; of gate and up
  Shortcut attention_shortcut, mlp_shortcut;
  Attention attention{};
};

struct Shape {
  int hidden = 0, inner = 0, heads = 0, kv_heads = 0, head_dim = 0;
  Activation activation = Activation::kSilu;
  Kept kept = Kept::kFloats;
};

// One row of a pass.
struct Row {
  int sequence;
  int offset;  // its entry's place after those that the cache holds, in every layer of the run
  int position;
  bool fills;   // it has halted: only its key and value are projected
  bool protected_bits;  // reads all bits
  bool protected_shortcuts;
  int max_bits;  // the most bits it reads
};

// One sequence's storage in one layer, with room for this run's entries.
struct Storage {
  void* keys;
  void* values;
  float* key_scales;  // of codes, else null
  float* value_scales;
  std::int32_t* positions;
  std::int32_t* masses;  // null where every entry stands for one token
  int held;              // entries before this run
};

// Of each row's queries and keys: [rows, head_dim].
struct Rotation {
  const float* cos;
  const float* sin;
};

// Counts of one layer, added to.
enum Count {
  kMacsAt0 = 0,  // of any-precision weights, by the bits read: 0, 1, ... 8
  kQueryRows = kMaxBits + 1,
  kFillRows,
  kEntriesRead,
  kAttended,
  kValuesSkipped,
  kScoresSkipped,
  kScoredTwice,
  kSkippedMlp,
  kSkippedAttention,
  kFittedMacs,
  kFittedBytes,
  kWeightBytes,
  kSignalEntry,
  kSignalScore,
  kSignalQuery,
  kLayerCounts
};

// Where Python keeps the counts of layers: layer after layer, `stride` apart, each count at its place.
struct CountTable {
  std::int64_t* counts;
  std::int64_t stride;
  const std::array<int, kLayerCounts>& places;
};

class LayerRunner {
 public:
  LayerRunner(const Shape& shape, std::vector<Layer> layers);
  ~LayerRunner();

  int num_layers() const { return static_cast<int>(layers_.size()); }

  int num_rotations() const;  // that layers name

  StageTimes& times();  // of its runs, added up; off until they are wanted

  // Runs layers [first, last) for rows [rows, hidden], in place.
  // storage: [last - first, sequences]. table: of layer `first` and those after it.
  void run(int first, int last, float* hidden, const std::vector<Row>& rows, const std::vector<Rotation>& rotations,
           const std::vector<Storage>& storage, int num_sequences, const CountTable& table, int threads,
           Next next);

 private:
  struct Pass;
  Shape shape_;
  std::vector<Layer> layers_;
  std::unique_ptr<Pass> pass_;
  std::mutex mutex_;
};

}  // namespace quicksilver
