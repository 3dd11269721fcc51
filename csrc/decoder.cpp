#include "decoder.h"

#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>

#include "attention.h"
#include "isa.h"
#include "pool.h"
#include "rows.h"

namespace quicksilver {
namespace {

constexpr std::int64_t kFloatBytes = sizeof(float);

// What maps read, and which maps read it.
enum Input { kToAttention, kFromAttention, kToMlp, kFromInner, kInputs };
constexpr int kFirstMap[kInputs + 1] = {kQuery, kOutput, kGate, kDown, kMaps};

Input input_of(int map) { return map < kOutput ? kToAttention : map < kGate ? kFromAttention : map < kDown ? kToMlp : kFromInner; }

int outputs_of(const LinearMap& map) { return map.matrix ? map.matrix->padded_outputs() : 0; }

// Where a map's outputs begin among those of its input.
int first_output(const Layer& layer, int map) {
  int first = 0;
  for (int m = kFirstMap[input_of(map)]; m < map; ++m) first += outputs_of(layer.maps[m]);
  return first;
}

// A map, and the rows that it meets.
struct Meeting {
  int map;
  const std::vector<int>* rows;
};

struct ThreadState {
  std::vector<float> centred, low_rank;
  std::vector<std::int64_t> counts;
};

}  // namespace

// What one run works on. Every thread walks through the same stages; barriers lie between them.
struct LayerRunner::Pass {
  std::vector<ThreadState> threads;
  std::vector<Workroom> rooms;
  Sharing sharing;
  std::array<std::vector<Operand>, kMaps> operands;
  std::array<Grid, kInputs> products;
  AttentionShare attention;
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

  StageTimes times;

  float* state(int row) { return hidden + std::size_t(row) * shape->hidden; }
  bool mine(int task, int thread) const { return task % num_threads == thread; }
  std::int64_t* counts(int layer, int thread) { return threads[thread].counts.data() + layer * kLayerCounts; }

  void prepare(const std::vector<Layer>& layers, int num_layers);
  void make_room(const std::vector<Layer>& layers, int n);
  void norm_rows(const std::vector<int>& of, const Norm& norm, const Shortcut& shortcut, bool attention, int layer,
                 int thread);
  bool takes(const Shortcut& shortcut, int row, bool attention, int layer, int thread);
  std::vector<int> not_past(const std::vector<int>& of) const;
  void choose(const LinearMap& linear, std::vector<Operand>& chosen, const std::vector<int>& of, const Grid* compact,
              BitsCounts& counts, std::int64_t& fitted_bytes, int thread);
  void count_channels(const LinearMap& linear, const BitsCounts& chosen, int layer_idx, int thread);
  float* product(const Layer& layer, int map, int row) {
    return products[input_of(map)].row(row) + first_output(layer, map);
  }
  void project(const Layer& layer, std::initializer_list<Meeting> meetings, const JoinedMaps* joined,
               const Grid* compact, const LinearMap* ahead, int layer_idx, int thread, Barrier& barrier);
  void write_entries(const Layer& layer, const std::vector<int>& asking, const Storage* storage, int thread);
  static int end_seen(const Storage* storage, const Row& row) { return storage[row.sequence].held + row.offset + 1; }
  int first_seen(const Layer& layer, const Storage& place, const Row& row) const;
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
  for (ThreadState& state : threads) state.counts.assign(std::size_t(num_layers) * kLayerCounts, 0);
  all.clear();
  running.clear();
  for (int r = 0; r < n; ++r) {
    all.push_back(r);
    if (!(*rows)[r].fills) running.push_back(r);
  }
  past.assign(n, 0);
  if (n > most_rows || rooms.size() < std::size_t(num_threads)) make_room(layers, std::max(n, most_rows));
}

// What depends on the layers and on how many rows there are: grows, and is left alone while runs are no larger.
void LayerRunner::Pass::make_room(const std::vector<Layer>& layers, int n) {
  normed.resize(n, shape->hidden);
  mapped.resize(n, shape->hidden);
  attended.resize(n, shape->heads * shape->head_dim);
  for (int input = 0; input < kInputs; ++input) {
    int stride = 0;
    for (const Layer& layer : layers) stride = std::max(stride, first_output(layer, kFirstMap[input + 1] - 1) + outputs_of(layer.maps[kFirstMap[input + 1] - 1]));
    products[input].resize(n, stride);
  }
  for (int m = 0; m < kMaps; ++m) {
    int inputs = 0;
    for (const Layer& layer : layers) inputs = std::max(inputs, layer.maps[m].matrix ? layer.maps[m].matrix->num_inputs : 0);
    if (operands[m].size() < std::size_t(n)) operands[m].resize(n);
    for (Operand& operand : operands[m]) operand.prepare(inputs);
  }
  std::vector<const Matrix*> matrices;
  for (const Layer& layer : layers) {
    matrices.clear();
    for (const LinearMap& map : layer.maps) {
      if (map.matrix) matrices.push_back(map.matrix);
    }
    for (const JoinedMaps* joined : {&layer.attention_input, &layer.mlp_input}) {
      if (joined->matrix) matrices.push_back(joined->matrix);
    }
    reserve(matrices, n, num_threads, sharing, rooms);
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

// Chooses a thread's share of the channels that a map reads of rows: the normed rows `of`, or rows 0, 1, ... of
// `compact`, which stand for them.
void LayerRunner::Pass::choose(const LinearMap& linear, std::vector<Operand>& chosen, const std::vector<int>& of,
                               const Grid* compact, BitsCounts& counts, std::int64_t& fitted_bytes, int thread) {
  const int inputs = linear.matrix->num_inputs, groups = Operand::groups_of(inputs);
  const int begin = groups * thread / num_threads, end = groups * (thread + 1) / num_threads;
  for (int i = 0; i < static_cast<int>(of.size()); ++i) {
    const float* x = compact ? const_cast<Grid*>(compact)->row(i) : normed.row(of[i]);
    if (linear.mean) {
      std::vector<float>& centred = threads[thread].centred;
      centred.resize(inputs);
      const int last = std::min(inputs, end * kGroupChannels);
      for (int j = begin * kGroupChannels; j < last; ++j) centred[j] = x[j] - linear.mean[j];
      x = centred.data();
      if (thread == 0) fitted_bytes += kFloatBytes * inputs;
    }
    const Row& row = (*rows)[of[i]];
    const Grades grades{linear.thresholds.data(), linear.levels.data(), static_cast<int>(linear.levels.size()),
                        linear.norms, row.max_bits};
    BitsChoice choice;
    if (!row.protected_bits) {
      choice.uniform = std::min(linear.bits, row.max_bits);
      choice.grades = linear.levels.empty() ? nullptr : &grades;
    }
    const BitsCounts found = chosen[i].choose(*floats, x, inputs, choice, begin, end);
    for (int bits = 0; bits <= kMaxBits; ++bits) counts[bits] += found[bits];
  }
}

// Counts what a map reads; at no more bits than its codes have.
void LayerRunner::Pass::count_channels(const LinearMap& linear, const BitsCounts& chosen, int layer_idx, int thread) {
  std::int64_t* counted = counts(layer_idx, thread);
  for (int bits = 0; bits <= kMaxBits; ++bits) {
    const int read = std::min(bits, linear.matrix->bits);
    counted[kMacsAt0 + read] += chosen[bits] * linear.matrix->num_outputs;
    counted[kWeightBytes] += chosen[bits] * linear.channel_bytes[read];
    if (!linear.levels.empty()) counted[kSignalScore] += chosen[bits];
  }
}

// Multiplies rows with maps of one input: with all at once where they lie side by side and read the same of it.
void LayerRunner::Pass::project(const Layer& layer, std::initializer_list<Meeting> meetings, const JoinedMaps* joined,
                                const Grid* compact, const LinearMap* ahead, int layer_idx, int thread,
                                Barrier& barrier) {
  Product multiplied[kMaps];
  int count = 0;
  const Meeting& lead = *meetings.begin();
  bool together = joined && joined->matrix;
  for (const Meeting& each : meetings) {
    together = together && *each.rows == *lead.rows && layer.maps[each.map].decides_like(layer.maps[lead.map]);
  }
  BitsCounts chosen{};
  std::int64_t fitted_bytes = 0;
  const Meeting* from = nullptr;  // whose operand the map at hand reads
  for (const Meeting& each : meetings) {
    const LinearMap& linear = layer.maps[each.map];
    if (!linear.matrix || each.rows->empty()) continue;
    if (!from || *each.rows != *from->rows || !linear.decides_like(layer.maps[from->map])) {
      chosen = {};
      fitted_bytes = 0;
      from = &each;
      choose(linear, operands[each.map], *each.rows, compact, chosen, fitted_bytes, thread);
    }
    counts(layer_idx, thread)[kFittedBytes] += fitted_bytes;
    if (linear.mean && thread == 0) {
      counts(layer_idx, thread)[kFittedBytes] += kFloatBytes * std::int64_t(each.rows->size()) * linear.matrix->num_outputs;
    }
    count_channels(linear, chosen, layer_idx, thread);
    if (!together) {
      multiplied[count++] = {linear.matrix, operands[from->map].data(), static_cast<int>(each.rows->size()),
                             product(layer, each.map, 0), std::size_t(products[input_of(each.map)].stride), linear.bias};
    }
  }
  if (together && !lead.rows->empty()) {
    multiplied[count++] = {joined->matrix, operands[lead.map].data(), static_cast<int>(lead.rows->size()),
                           product(layer, lead.map, 0), std::size_t(products[input_of(lead.map)].stride),
                           joined->bias.empty() ? nullptr : joined->bias.data()};
  }
  if (thread == 0) times.end(kSelecting);
  multiply(multiplied, count, sharing, ahead && ahead->matrix ? std::vector<const Matrix*>{ahead->matrix} : std::vector<const Matrix*>{},
           thread, num_threads, rooms[thread], barrier);
  if (thread == 0) times.end(kMultiplying);
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
      for (std::size_t h = 0; h < std::size_t(shape->kv_heads); ++h) {
        floats->encode(x + h * size, size, static_cast<std::int8_t*>(base) + (first + h) * size,
                       scales + (first + h) * scales_of(size));
      }
    }
  };
  if (thread == 0) {
    int most = 0;
    for (int row : asking) most = std::max(most, end_seen(storage, (*rows)[row]));
    attention.prepare({shape->heads, shape->kv_heads, size}, static_cast<int>(asking.size()), most, num_threads);
  }
  for (int row : all) {
    if (!mine(row, thread)) continue;
    const Row& entry = (*rows)[row];
    const Storage& place = storage[entry.sequence];
    const std::size_t slot = std::size_t(place.held) + entry.offset;
    float* key = product(layer, kKey, row);
    turn(key, shape->kv_heads, layer.key_norm, row);
    for (int d = 0; layer.key_centre && d < shape->kv_heads * size; ++d) key[d] -= layer.key_centre[d];
    keep(key, place.keys, place.key_scales, slot);
    keep(product(layer, kValue, row), place.values, place.value_scales, slot);
    place.positions[slot] = entry.position;
    if (place.masses) place.masses[slot] = 1;
  }
  for (int i = 0; i < static_cast<int>(asking.size()); ++i) {
    if (!mine(i + 1, thread)) continue;  // another thread than wrote a lone row's entry
    turn(product(layer, kQuery, i), shape->heads, layer.query_norm, asking[i]);
  }
}

// The first entry that is not too old for a row; positions ascend.
int LayerRunner::Pass::first_seen(const Layer& layer, const Storage& place, const Row& row) const {
  if (layer.window == 0 || row.position < layer.window) return 0;
  const std::int32_t* positions = place.positions;
  const std::int32_t* own = positions + place.held + row.offset;
  return static_cast<int>(std::upper_bound(positions, own, row.position - layer.window) - positions);
}

void LayerRunner::Pass::attend(const Layer& layer, const std::vector<int>& asking, const Storage* storage,
                               int layer_idx, int thread) {
  const std::int64_t heads = shape->kv_heads, stride = heads * shape->head_dim;
  std::vector<Asking> rows_asking;
  for (int i = 0; i < static_cast<int>(asking.size()); ++i) {
    const Row& row = (*rows)[asking[i]];
    const Storage& place = storage[row.sequence];
    const Entries entries{shape->kept,        place.keys,   place.values, place.key_scales,
                          place.value_scales, place.masses, stride,       heads * scales_of(shape->head_dim)};
    rows_asking.push_back({product(layer, kQuery, i), attended.row(i), entries, first_seen(layer, place, row),
                           end_seen(storage, row)});
  }
  const Skipped skipped = attention.attend(*floats, layer.attention, rows_asking, thread);
  std::int64_t* counted = counts(layer_idx, thread);
  counted[kValuesSkipped] += skipped.values;
  counted[kScoresSkipped] += skipped.scores;
  counted[kScoredTwice] += skipped.scored_twice;
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
    float* added = product(layer, map, i);
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
  const auto stage_ends = [&](Stage stage) {
    if (thread == 0) times.end(stage);
  };
  norm_rows(all, layer.attention_norm, layer.attention_shortcut, true, layer_idx, thread);
  barrier.wait();
  stage_ends(kNorming);
  const std::vector<int> asking = not_past(running);
  const bool gated = layer.maps[kGate].matrix != nullptr;
  project(layer, {{kQuery, &asking}, {kKey, &all}, {kValue, &all}}, &layer.attention_input, nullptr,
          &layer.maps[kOutput], layer_idx, thread, barrier);
  write_entries(layer, asking, storage, thread);
  barrier.wait();
  if (thread == 0) count_rows(layer, asking, storage, num_sequences, layer_idx);
  stage_ends(kEntering);
  attend(layer, asking, storage, layer_idx, thread);
  barrier.wait();
  stage_ends(kAttending);
  project(layer, {{kOutput, &asking}}, nullptr, &attended, &layer.maps[gated ? kGate : kUp], layer_idx, thread, barrier);
  // A row's own thread adds to it and norms it, here and in the next layer.
  add(layer, layer.attention_post_norm, asking, kOutput, thread);
  norm_rows(running, layer.mlp_norm, layer.mlp_shortcut, false, layer_idx, thread);
  barrier.wait();
  stage_ends(kNorming);
  const std::vector<int> through = not_past(running);
  const int ran = static_cast<int>(through.size());
  if (gated) {
    project(layer, {{kGate, &through}, {kUp, &through}}, &layer.mlp_input, nullptr, &layer.maps[kDown], layer_idx, thread, barrier);
  } else {
    project(layer, {{kUp, &through}}, nullptr, nullptr, &layer.maps[kDown], layer_idx, thread, barrier);
  }
  Grid& inner = products[kToMlp];
  const int begin = shape->inner * thread / num_threads, end = shape->inner * (thread + 1) / num_threads;
  for (int i = 0; i < ran; ++i) {
    floats->activate(shape->activation, inner.row(i) + begin, gated ? product(layer, kUp, i) + begin : nullptr,
                     end - begin);
  }
  barrier.wait();
  stage_ends(kNorming);
  project(layer, {{kDown, &through}}, nullptr, &inner, after ? &after->maps[kQuery] : nullptr, layer_idx, thread, barrier);
  add(layer, layer.mlp_post_norm, through, kDown, thread);
  stage_ends(kNorming);
}

LayerRunner::LayerRunner(const Shape& shape, std::vector<Layer> layers)
    : shape_(shape), layers_(std::move(layers)), pass_(new Pass) {}

LayerRunner::~LayerRunner() = default;

int LayerRunner::num_rotations() const {
  int most = -1;
  for (const Layer& layer : layers_) most = std::max(most, layer.rotary);
  return most + 1;
}

StageTimes& LayerRunner::times() { return pass_->times; }

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
    if (thread == 0) pass.times.begin();
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
