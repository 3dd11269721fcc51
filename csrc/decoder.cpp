#include "decoder.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstring>

#include "isa.h"
#include "pool.h"
#include "rows.h"

namespace quicksilver {
namespace {

constexpr std::int64_t kFloatBytes = sizeof(float);

struct ThreadState {
  std::vector<float> centred, scores, low_rank;
  std::vector<std::int64_t> counts;
};

}  // namespace

// What one run works on. Every thread walks through the same stages; barriers lie between them.
struct LayerRunner::Pass {
  std::vector<ThreadState> threads;
  std::vector<Coefficients> rooms;
  Sharing sharing;
  std::array<std::vector<Selection>, kMaps> selections;
  std::array<Grid, kMaps> products;
  Grid normed, attended, mapped;
  std::vector<char> past;  // of each row: it goes past the sublayer at hand
  std::vector<int> all, running;
  int most_rows = 0;  // that there is room for

  // Of the run at hand.
  const Shape* shape;
  const FloatKernels* floats;
  const std::vector<Row>* rows;
  float* hidden;
  const std::vector<Rotation>* rotations;
  int num_threads;

  float* state(int row) { return hidden + std::size_t(row) * shape->hidden; }
  bool mine(int task, int thread) const { return task % num_threads == thread; }
  std::int64_t* counts(int layer, int thread) { return threads[thread].counts.data() + layer * kLayerCounts; }

  void prepare(const std::vector<Layer>& layers, int num_layers);
  void make_room(const std::vector<Layer>& layers, int n);
  void norm_rows(const std::vector<int>& of, const Norm& norm, const Shortcut& shortcut, bool attention, int layer,
                 int thread);
  bool takes(const Shortcut& shortcut, int row, bool attention, int layer, int thread);
  std::vector<int> not_past(const std::vector<int>& of) const;
  void choose(const Layer& layer, int map, const std::vector<int>& of, const Grid* compact, int layer_idx, int thread);
  Product product(const Layer& layer, int map, int num_rows);
  void multiply_maps(const Layer& layer, std::initializer_list<std::pair<int, int>> maps, const LinearMap* ahead,
                     int num_ahead, int thread, Barrier& barrier);
  void write_entries(const Layer& layer, const std::vector<int>& asking, const Storage* storage, int thread);
  int first_seen(const Layer& layer, const Storage& place, const Row& row) const;
  Entries entries_of(const Storage& place, int head, int first, int count) const;
  void attend(const Layer& layer, const std::vector<int>& asking, const Storage* storage, int layer_idx, int thread);
  void count_rows(const Layer& layer, const std::vector<int>& asking, const Storage* storage, int num_sequences,
                  int layer_idx);
  void add(const Layer& layer, const Norm& post_norm, const std::vector<int>& ran, int map, int thread);
  void run_layer(const Layer& layer, const Layer* after, int layer_idx, const Storage* storage, int num_sequences,
                 int thread, Barrier& barrier);
};

void LayerRunner::Pass::prepare(const std::vector<Layer>& layers, int num_layers) {
  const int n = static_cast<int>(rows->size());
  threads.resize(std::max<std::size_t>(threads.size(), num_threads));
  rooms.resize(threads.size());
  for (ThreadState& state : threads) state.counts.assign(std::size_t(num_layers) * kLayerCounts, 0);
  all.clear();
  running.clear();
  for (int r = 0; r < n; ++r) {
    all.push_back(r);
    if (!(*rows)[r].fills) running.push_back(r);
  }
  past.assign(n, 0);
  if (n > most_rows) make_room(layers, n);
}

// What depends on the layers and on how many rows there are: grows, and is left alone while runs are no larger.
void LayerRunner::Pass::make_room(const std::vector<Layer>& layers, int n) {
  normed.resize(n, shape->hidden);
  mapped.resize(n, shape->hidden);
  attended.resize(n, shape->heads * shape->head_dim);
  for (int m = 0; m < kMaps; ++m) {
    int stride = 0, inputs = 0;
    for (const Layer& layer : layers) {
      if (!layer.maps[m].matrix) continue;
      stride = std::max(stride, layer.maps[m].matrix->padded_outputs());
      inputs = std::max(inputs, layer.maps[m].matrix->num_inputs());
    }
    products[m].resize(n, stride);
    if (selections[m].size() < std::size_t(n)) selections[m].resize(n);
    for (Selection& selection : selections[m]) selection.prepare(inputs);
  }
  std::vector<const AnyPrecisionMatrix*> matrices;
  for (const Layer& layer : layers) {
    matrices.clear();
    for (const LinearMap& map : layer.maps) {
      if (map.matrix) matrices.push_back(map.matrix);
    }
    reserve(matrices, n, sharing);
  }
  most_rows = n;
}

bool LayerRunner::Pass::takes(const Shortcut& shortcut, int row, bool attention, int layer, int thread) {
  const Row& entry = (*rows)[row];
  if (!shortcut.present || entry.fills || entry.protected_shortcuts) return false;
  std::int64_t* counted = counts(layer, thread);
  const int d = shape->hidden;
  if (shortcut.gate) {
    counted[kFittedMacs] += 2 * d + 2;  // the gate's, and the norm's of the state
    counted[kFittedBytes] += kFloatBytes * (d + 2);
    const float length = std::max(std::sqrt(floats->dot(state(row), state(row), d)), FLT_MIN);
    const float predicted =
        floats->dot(normed.row(row), shortcut.gate, d) + shortcut.gate[d] * std::log(length) + shortcut.gate[d + 1];
    if (!(predicted < shortcut.log_threshold)) return false;
  }
  const std::int64_t weights = std::int64_t{d} * (shortcut.map.down ? 2 * shortcut.map.rank : d);
  ++counted[attention ? kSkippedAttention : kSkippedMlp];
  counted[kFittedMacs] += weights;
  counted[kFittedBytes] += kFloatBytes * (weights + d);
  return true;
}

// Norms rows, lets those past the sublayer that take its shortcut, and applies the map to them.
void LayerRunner::Pass::norm_rows(const std::vector<int>& of, const Norm& norm, const Shortcut& shortcut,
                                  bool attention, int layer, int thread) {
  for (int row : of) {
    if (!mine(row, thread)) continue;
    if (norm.weight) {
      floats->norm(state(row), shape->hidden, norm, normed.row(row));
    } else {
      std::copy_n(state(row), shape->hidden, normed.row(row));
    }
    past[row] = takes(shortcut, row, attention, layer, thread);
    if (past[row]) {
      apply(*floats, shortcut.map, normed.row(row), shape->hidden, threads[thread].low_rank, mapped.row(row));
    }
  }
}

std::vector<int> LayerRunner::Pass::not_past(const std::vector<int>& of) const {
  std::vector<int> through;
  for (int row : of) {
    if (!past[row]) through.push_back(row);
  }
  return through;
}

// Chooses a thread's share of the channels of a map's inputs: the normed rows `of`, or rows 0, 1, ... of `compact`,
// which stand for them.
void LayerRunner::Pass::choose(const Layer& layer, int map, const std::vector<int>& of, const Grid* compact,
                               int layer_idx, int thread) {
  const LinearMap& linear = layer.maps[map];
  const int inputs = linear.matrix->num_inputs(), blocks = Selection::blocks_of(inputs);
  const int begin = blocks * thread / num_threads, end = blocks * (thread + 1) / num_threads;
  std::int64_t* counted = counts(layer_idx, thread);
  const std::int64_t outputs = linear.matrix->num_outputs();
  if (linear.mean && thread == 0) counted[kFittedBytes] += kFloatBytes * std::int64_t(of.size()) * (inputs + outputs);
  for (int i = 0; i < static_cast<int>(of.size()); ++i) {
    const float* x = compact ? const_cast<Grid*>(compact)->row(i) : normed.row(of[i]);
    if (linear.mean) {
      std::vector<float>& centred = threads[thread].centred;
      centred.resize(inputs);
      const int last = std::min(inputs, end * kChunkChannels);
      for (int j = begin * kChunkChannels; j < last; ++j) centred[j] = x[j] - linear.mean[j];
      x = centred.data();
    }
    const Row& row = (*rows)[of[i]];
    const Grades grades{linear.thresholds.data(), linear.levels.data(), static_cast<int>(linear.levels.size()),
                        linear.norms, row.max_bits};
    BitsChoice choice;
    if (!row.protected_bits) {
      choice.uniform = std::min(linear.bits, row.max_bits);
      choice.grades = linear.levels.empty() ? nullptr : &grades;
    }
    const BitsCounts chosen =
        selections[map][i].choose(*floats, x, linear.matrix->base_scales(), inputs, choice, begin, end);
    for (int bits = 0; bits <= kMaxBits; ++bits) {
      counted[kMacsAt0 + bits] += chosen[bits] * outputs;
      counted[kWeightBytes] += chosen[bits] * linear.channel_bytes[bits];
      if (!linear.levels.empty()) counted[kSignalScore] += chosen[bits];
    }
  }
}

Product LayerRunner::Pass::product(const Layer& layer, int map, int num_rows) {
  return {layer.maps[map].matrix, selections[map].data(), num_rows,
          products[map].row(0),   products[map].stride,   layer.maps[map].bias};
}

void LayerRunner::Pass::multiply_maps(const Layer& layer, std::initializer_list<std::pair<int, int>> maps,
                                      const LinearMap* ahead, int num_ahead, int thread, Barrier& barrier) {
  std::vector<Ahead> coming;
  for (const LinearMap* map = ahead; map < ahead + num_ahead; ++map) {
    if (map->matrix) coming.push_back({map->matrix, planes_of(map->likely_bits())});
  }
  Product multiplied[kMaps];
  int count = 0;
  for (const auto& [map, num_rows] : maps) {
    if (num_rows > 0) multiplied[count++] = product(layer, map, num_rows);
  }
  multiply(multiplied, count, sharing, coming, thread, num_threads, rooms[thread], barrier);
}

// Norms and rotates queries and keys, and writes the rows' entries.
void LayerRunner::Pass::write_entries(const Layer& layer, const std::vector<int>& asking, const Storage* storage,
                                      int thread) {
  const int size = shape->head_dim;
  const Rotation* rotation = layer.rotary < 0 ? nullptr : &(*rotations)[layer.rotary];
  const auto turn = [&](float* heads, int count, const Norm& norm, int row) {
    const int length = layer.norms_projections ? count * size : size;
    for (int i = 0; norm.weight && i < count * size; i += length) floats->norm(heads + i, length, norm, heads + i);
    const std::size_t at = std::size_t(row) * size;
    if (rotation) floats->rotate(heads, count, size, rotation->cos + at, rotation->sin + at);
  };
  const auto keep = [&](const float* x, void* base, float* scales, std::size_t slot) {
    const std::size_t first = slot * shape->kv_heads;
    const int all = shape->kv_heads * size;
    if (shape->kept == Kept::kFloats) {
      std::copy_n(x, all, static_cast<float*>(base) + first * size);
    } else if (shape->kept == Kept::kBfloat16) {
      floats->to_bfloat16(x, all, static_cast<std::uint16_t*>(base) + first * size);
    } else {
      for (int h = 0; h < shape->kv_heads; ++h) {
        scales[first + h] = floats->encode(x + h * size, size, static_cast<std::int8_t*>(base) + (first + h) * size);
      }
    }
  };
  for (int row : all) {
    if (!mine(row, thread)) continue;
    const Row& entry = (*rows)[row];
    const Storage& place = storage[entry.sequence];
    const std::size_t slot = std::size_t(place.held) + entry.offset;
    turn(products[kKey].row(row), shape->kv_heads, layer.key_norm, row);
    keep(products[kKey].row(row), place.keys, place.key_scales, slot);
    keep(products[kValue].row(row), place.values, place.value_scales, slot);
    place.positions[slot] = entry.position;
    if (place.masses) place.masses[slot] = 1;
  }
  for (int i = 0; i < static_cast<int>(asking.size()); ++i) {
    if (!mine(i + 1, thread)) continue;  // another thread than wrote a lone row's entry
    turn(products[kQuery].row(i), shape->heads, layer.query_norm, asking[i]);
  }
}

// The first entry that is not too old for a row; positions ascend.
int LayerRunner::Pass::first_seen(const Layer& layer, const Storage& place, const Row& row) const {
  if (layer.window == 0 || row.position < layer.window) return 0;
  const std::int32_t* positions = place.positions;
  const std::int32_t* own = positions + place.held + row.offset;
  return static_cast<int>(std::upper_bound(positions, own, row.position - layer.window) - positions);
}

// One head's entries from the first, `count` of them.
Entries LayerRunner::Pass::entries_of(const Storage& place, int head, int first, int count) const {
  const std::size_t skipped = std::size_t(first) * shape->kv_heads;
  const std::size_t offset = (skipped + head) * shape->head_dim * bytes_of(shape->kept);
  return {shape->kept,
          static_cast<const char*>(place.keys) + offset,
          static_cast<const char*>(place.values) + offset,
          place.key_scales ? place.key_scales + skipped + head : nullptr,
          place.value_scales ? place.value_scales + skipped + head : nullptr,
          place.masses ? place.masses + first : nullptr,
          std::int64_t{shape->kv_heads} * shape->head_dim,
          shape->kv_heads,
          count};
}

void LayerRunner::Pass::attend(const Layer& layer, const std::vector<int>& asking, const Storage* storage,
                               int layer_idx, int thread) {
  const int size = shape->head_dim, group = shape->heads / shape->kv_heads;
  std::vector<float>& room = threads[thread].scores;
  std::int64_t* counted = counts(layer_idx, thread);
  for (int i = 0; i < static_cast<int>(asking.size()); ++i) {
    const Row& row = (*rows)[asking[i]];
    const Storage& place = storage[row.sequence];
    const int first = first_seen(layer, place, row), count = place.held + row.offset + 1 - first;
    if (room.size() < std::size_t(count) + size) room.resize(std::size_t(count) + size + 256);
    for (int h = 0; h < shape->kv_heads; ++h) {
      // Few rows share their heads, of which neighbours' entries are neighbours; of many each has a thread of its own.
      const bool many = static_cast<int>(asking.size()) >= 2 * num_threads;
      if (many ? !mine(i, thread) : h * num_threads / shape->kv_heads != thread) continue;
      const std::size_t at = std::size_t(h) * group * size;
      const Skipped skipped = floats->attend(products[kQuery].row(i) + at, group, size, entries_of(place, h, first, count),
                                             layer.attention, room.data(), attended.row(i) + at);
      counted[kValuesSkipped] += skipped.values;
      counted[kScoresSkipped] += skipped.scores;
      counted[kScoredTwice] += skipped.scored_twice;
    }
  }
}

void LayerRunner::Pass::count_rows(const Layer& layer, const std::vector<int>& asking, const Storage* storage,
                                   int num_sequences, int layer_idx) {
  std::int64_t* counted = counts(layer_idx, 0);
  counted[kQueryRows] += running.size();
  counted[kFillRows] += all.size() - running.size();
  if (shape->kept == Kept::kCodes) counted[kSignalEntry] += all.size();
  if (layer.attention.skip_below > 0.0f) counted[kSignalQuery] += asking.size();
  std::vector<int> written(num_sequences, 0);
  std::vector<int> from(num_sequences, -1);  // the first entry that any row sees; -1 where none asks
  for (int row : all) ++written[(*rows)[row].sequence];
  for (int row : asking) {
    const Row& entry = (*rows)[row];
    const Storage& place = storage[entry.sequence];
    const int first = first_seen(layer, place, entry);
    counted[kAttended] += place.held + entry.offset + 1 - first;
    if (from[entry.sequence] < 0) from[entry.sequence] = first;
  }
  for (int s = 0; s < num_sequences; ++s) counted[kEntriesRead] += from[s] < 0 ? 0 : storage[s].held + written[s] - from[s];
}

// Adds to the running rows what the sublayer gives: its last map's products, or the shortcut's.
void LayerRunner::Pass::add(const Layer& layer, const Norm& post_norm, const std::vector<int>& ran, int map,
                            int thread) {
  for (int i = 0; i < static_cast<int>(ran.size()); ++i) {
    if (!mine(ran[i], thread)) continue;
    float* added = products[map].row(i);
    if (post_norm.weight) floats->norm(added, shape->hidden, post_norm, added);
    for (int d = 0; d < shape->hidden; ++d) state(ran[i])[d] += added[d] * layer.residual_scale;
  }
  for (int row : running) {
    if (!mine(row, thread) || !past[row]) continue;
    for (int d = 0; d < shape->hidden; ++d) state(row)[d] += mapped.row(row)[d];
  }
}

void LayerRunner::Pass::run_layer(const Layer& layer, const Layer* after, int layer_idx, const Storage* storage,
                                  int num_sequences, int thread, Barrier& barrier) {
  norm_rows(all, layer.attention_norm, layer.attention_shortcut, true, layer_idx, thread);
  barrier.wait();
  const std::vector<int> asking = not_past(running);
  const int n = static_cast<int>(all.size()), asked = static_cast<int>(asking.size());
  choose(layer, kQuery, asking, nullptr, layer_idx, thread);
  choose(layer, kKey, all, nullptr, layer_idx, thread);
  choose(layer, kValue, all, nullptr, layer_idx, thread);
  multiply_maps(layer, {{kQuery, asked}, {kKey, n}, {kValue, n}}, &layer.maps[kOutput], 1, thread, barrier);
  write_entries(layer, asking, storage, thread);
  barrier.wait();
  if (thread == 0) count_rows(layer, asking, storage, num_sequences, layer_idx);
  attend(layer, asking, storage, layer_idx, thread);
  barrier.wait();
  choose(layer, kOutput, asking, &attended, layer_idx, thread);
  multiply_maps(layer, {{kOutput, asked}}, &layer.maps[kGate], 2, thread, barrier);
  // A row's own thread adds to it and norms it, here and in the next layer.
  add(layer, layer.attention_post_norm, asking, kOutput, thread);
  norm_rows(running, layer.mlp_norm, layer.mlp_shortcut, false, layer_idx, thread);
  barrier.wait();
  const std::vector<int> through = not_past(running);
  const int ran = static_cast<int>(through.size());
  const bool gated = layer.maps[kGate].matrix != nullptr;
  if (gated) choose(layer, kGate, through, nullptr, layer_idx, thread);
  choose(layer, kUp, through, nullptr, layer_idx, thread);
  multiply_maps(layer, {{kGate, gated ? ran : 0}, {kUp, ran}}, &layer.maps[kDown], 1, thread, barrier);
  Grid& inner = products[gated ? kGate : kUp];
  const int begin = shape->inner * thread / num_threads, end = shape->inner * (thread + 1) / num_threads;
  for (int i = 0; i < ran; ++i) {
    floats->activate(shape->activation, inner.row(i) + begin, gated ? products[kUp].row(i) + begin : nullptr,
                     end - begin);
  }
  barrier.wait();
  choose(layer, kDown, through, &inner, layer_idx, thread);
  multiply_maps(layer, {{kDown, ran}}, after ? &after->maps[kQuery] : nullptr, after ? 3 : 0, thread, barrier);
  add(layer, layer.mlp_post_norm, through, kDown, thread);
}

LayerRunner::LayerRunner(const Shape& shape, std::vector<Layer> layers)
    : shape_(shape), layers_(std::move(layers)), pass_(new Pass) {}

LayerRunner::~LayerRunner() = default;

int LayerRunner::num_rotations() const {
  int most = -1;
  for (const Layer& layer : layers_) most = std::max(most, layer.rotary);
  return most + 1;
}

void LayerRunner::run(int first, int last, float* hidden, const std::vector<Row>& rows,
                      const std::vector<Rotation>& rotations, const std::vector<Storage>& storage, int num_sequences,
                      const CountTable& table, int threads, Next next) {
  std::lock_guard<std::mutex> one_at_a_time(mutex_);
  Pass& pass = *pass_;
  pass.shape = &shape_;
  pass.floats = &current_kernels().floats;
  pass.rows = &rows;
  pass.hidden = hidden;
  pass.rotations = &rotations;
  pass.num_threads = threads;
  pass.prepare(layers_, last - first);
  const auto run_all = [&](int thread, Barrier& barrier) {
    for (int i = first; i < last; ++i) {
      pass.run_layer(layers_[i], i + 1 < last ? &layers_[i + 1] : nullptr, i - first,
                     storage.data() + std::size_t(i - first) * num_sequences, num_sequences, thread, barrier);
    }
  };
  Pool::shared().run(threads, run_all, next);
  for (int layer = 0; layer < last - first; ++layer) {
    std::int64_t* row = table.counts + layer * table.stride;
    for (int t = 0; t < threads; ++t) {
      const std::int64_t* counted = pass.counts(layer, t);
      for (int count = 0; count < kLayerCounts; ++count) row[table.places[count]] += counted[count];
    }
  }
}

}  // namespace quicksilver
