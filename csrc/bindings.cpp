// What Python sees: prepared matrices, and calls on rows and layers by address. Checks of shapes are the Python side's.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "attention.h"
#include "decoder.h"
#include "isa.h"
#include "matrix.h"
#include "names.h"
#include "pool.h"
#include "product.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace quicksilver {
namespace {

// Addresses come from tensors that the Python side keeps alive; 0 is null.
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const float* floats_at(Address address) { return at<const float>(address); }

Steps steps_of(const std::string& kind) {
  if (kind == "half") return Steps::kHalf;
  if (kind == "unsigned") return Steps::kUnsigned;
  if (kind == "signed") return Steps::kSigned;
  throw std::invalid_argument("no such steps: " + kind);
}

Offsets offsets_of(const std::string& kind) {
  if (kind == "none") return Offsets::kNone;
  if (kind == "half") return Offsets::kHalf;
  if (kind == "unsigned") return Offsets::kUnsigned;
  if (kind == "zeros") return Offsets::kZeros;
  throw std::invalid_argument("no such offsets: " + kind);
}

Matrix* new_matrix(int num_inputs, int num_outputs, int bits, int group_size, int unit, Address high, Address low,
                   std::size_t unit_stride, const std::string& steps_kind, Address steps,
                   const std::string& offsets_kind, Address offsets, Address block_steps, Address block_offsets,
                   std::size_t scale_stride, int zero, float factor) {
  if (num_inputs < 1 || num_outputs < 1 || unit < 1 || group_size < 1) {
    throw std::invalid_argument("a matrix has inputs, outputs, groups and units");
  }
  Matrix* matrix = new Matrix;
  matrix->num_inputs = num_inputs;
  matrix->num_outputs = num_outputs;
  matrix->bits = bits;
  matrix->group_size = group_size;
  matrix->unit = unit;
  matrix->high = at<const std::uint8_t>(high);
  matrix->low = at<const std::uint8_t>(low);
  matrix->unit_stride = unit_stride;
  matrix->scales = {steps_of(steps_kind), offsets_of(offsets_kind), at<const void>(steps), at<const void>(offsets),
                    at<const std::uint16_t>(block_steps), at<const std::uint16_t>(block_offsets)};
  matrix->scale_stride = scale_stride;
  matrix->zero = zero;
  matrix->factor = factor;
  matrix->find_places();
  return matrix;
}

struct Rooms {
  std::vector<Workroom> threads;
  std::vector<Operand> rows;
  Sharing sharing;
  std::vector<float> normed;
};

Rooms& rooms_of_caller() {
  thread_local Rooms rooms;
  return rooms;
}

// What is multiplied with a matrix: the same for all rows.
struct Multiplied {
  const Matrix& matrix;
  Norm norm;                 // of rows first; weight null for none
  const std::uint8_t* bits;  // [rows, in], or [rows], or null where `uniform` is every row's
  bool by_channel;
  int uniform, threads;

  BitsChoice bits_of(int row) const {
    BitsChoice found;
    found.uniform = bits && !by_channel ? bits[row] : uniform;
    if (by_channel) found.each = bits + std::size_t(row) * matrix.num_inputs;
    return found;
  }
};

constexpr int kRowsOfCall = 512;  // whose activations are held at a time

// Multiplies rows [first, first + num_rows) of x, [rows, in].
void multiply_some(const Multiplied& by, const float* x, float* y, int first, int num_rows) {
  Rooms& rooms = rooms_of_caller();
  const FloatKernels& floats = current_kernels().floats;
  const int inputs = by.matrix.num_inputs, groups = Operand::groups_of(inputs);
  if (rooms.rows.size() < std::size_t(num_rows)) rooms.rows.resize(num_rows);
  x += std::size_t(first) * inputs;
  for (int r = 0; r < num_rows; ++r) rooms.rows[r].prepare(inputs);
  if (by.norm.weight) {
    rooms.normed.resize(std::size_t(num_rows) * inputs);
    for (int r = 0; r < num_rows; ++r) {
      floats.norm(x + std::size_t(r) * inputs, inputs, by.norm, rooms.normed.data() + std::size_t(r) * inputs);
    }
    x = rooms.normed.data();
  }
  reserve({&by.matrix}, num_rows, by.threads, rooms.sharing, rooms.threads);
  const std::size_t outputs = by.matrix.num_outputs;
  const Product product{&by.matrix, rooms.rows.data(), num_rows, y + first * outputs, outputs, nullptr};
  Pool::shared().run(by.threads, [&](int thread, Barrier& barrier) {
    const int begin = groups * thread / by.threads, end = groups * (thread + 1) / by.threads;
    for (int r = 0; r < num_rows; ++r) {
      rooms.rows[r].choose(floats, x + std::size_t(r) * inputs, inputs, by.bits_of(first + r), begin, end);
    }
    multiply(&product, 1, rooms.sharing, {}, thread, by.threads, rooms.threads[thread], barrier);
  });
}

// Multiplies float32 rows [num_rows, in], normed first where there is a norm's weight, into [num_rows, out]. Bits:
// uint8 [num_rows, in] by channel, [num_rows] otherwise, or null.
void multiply_rows(const Matrix& matrix, Address x, Address y, int num_rows, Address bits, bool by_channel,
                   int uniform, Address norm_weight, Address norm_bias, float epsilon, int threads) {
  if (threads < 1) throw std::invalid_argument("there must be a thread");
  if (by_channel && !bits) throw std::invalid_argument("there are no bits by channel");
  nb::gil_scoped_release release;
  const Norm norm{floats_at(norm_weight), floats_at(norm_bias), epsilon};
  const Multiplied by{matrix, norm, at<const std::uint8_t>(bits), by_channel, uniform, threads};
  for (int first = 0; first < num_rows; first += kRowsOfCall) {
    multiply_some(by, floats_at(x), at<float>(y), first, std::min(kRowsOfCall, num_rows - first));
  }
}

LinearMap& map_of(Layer& layer, const std::string& name) {
  for (const Named& each : kMapNames) {
    if (name == each.name) return layer.maps[each.index];
  }
  throw std::invalid_argument("no such map: " + name);
}

void set_map(Layer& layer, const std::string& map, const Matrix& matrix, Address bias, Address mean,
             int bits, const std::vector<std::int64_t>& channel_bytes) {
  LinearMap& linear = map_of(layer, map);
  linear.matrix = &matrix;
  linear.bias = floats_at(bias);
  linear.mean = floats_at(mean);
  linear.bits = bits;
  if (channel_bytes.size() != linear.channel_bytes.size()) throw std::invalid_argument("bytes of 0 to 8 bits are needed");
  std::copy(channel_bytes.begin(), channel_bytes.end(), linear.channel_bytes.begin());
}

void grade_map(Layer& layer, const std::string& map, std::vector<float> thresholds, std::vector<std::uint8_t> levels,
               Address norms) {
  if (levels.size() != thresholds.size() + 1) throw std::invalid_argument("one threshold fewer than bits is needed");
  LinearMap& linear = map_of(layer, map);
  if (!linear.matrix) throw std::invalid_argument("the map has no matrix");
  linear.thresholds = std::move(thresholds);
  linear.levels = std::move(levels);
  linear.norms = floats_at(norms);
}

// Of maps whose matrices are parts of one, in the order of their outputs.
void join_maps(Layer& layer, bool attention, const Matrix& matrix) {
  JoinedMaps& joined = attention ? layer.attention_input : layer.mlp_input;
  joined.matrix = &matrix;
  joined.bias.clear();
  int first = 0;
  const int begin = attention ? kQuery : kGate, end = attention ? kOutput : kDown;
  for (int map = begin; map < end; ++map) {
    const LinearMap& linear = layer.maps[map];
    if (!linear.matrix) throw std::invalid_argument("a joined map has no matrix");
    if (linear.bias) {
      joined.bias.resize(matrix.num_outputs, 0.0f);
      std::copy_n(linear.bias, linear.matrix->num_outputs, joined.bias.begin() + first);
    }
    first += linear.matrix->padded_outputs();
  }
  if (first != matrix.padded_outputs()) throw std::invalid_argument("joined maps are not the matrix's parts");
}

void set_shortcut(Layer& layer, bool attention, Address down, Address up, Address bias, int rank, Address gate,
                  float log_threshold) {
  Shortcut& shortcut = attention ? layer.attention_shortcut : layer.mlp_shortcut;
  shortcut.present = true;
  shortcut.map = {floats_at(down), floats_at(up), floats_at(bias), rank};
  shortcut.gate = floats_at(gate);
  shortcut.log_threshold = log_threshold;
}

void set_norm(Layer& layer, const std::string& which, Address weight, Address bias, float epsilon) {
  const std::pair<const char*, Norm*> norms[] = {{"attention", &layer.attention_norm},
                                                 {"mlp", &layer.mlp_norm},
                                                 {"query", &layer.query_norm},
                                                 {"key", &layer.key_norm},
                                                 {"attention_post", &layer.attention_post_norm},
                                                 {"mlp_post", &layer.mlp_post_norm}};
  for (const auto& [name, norm] : norms) {
    if (which == name) {
      *norm = {floats_at(weight), floats_at(bias), epsilon};
      return;
    }
  }
  throw std::invalid_argument("no such norm: " + which);
}

constexpr int kRowFields = 7, kStorageFields = 7;

void check_fields(const std::vector<std::int64_t>& fields, std::size_t count, int each, const char* of) {
  if (fields.size() != count * each) {
    throw std::invalid_argument(std::to_string(count) + " " + of + " of " + std::to_string(each) +
                                " fields are needed, got " + std::to_string(fields.size()) + " fields");
  }
}

std::vector<Row> rows_of(const std::vector<std::int64_t>& fields, int num_rows, int num_sequences) {
  check_fields(fields, num_rows, kRowFields, "rows");
  std::vector<Row> rows;
  for (auto f = fields.begin(); f != fields.end(); f += kRowFields) {
    if (f[0] < 0 || f[0] >= num_sequences) throw std::invalid_argument("a row is of a sequence that there is not");
    rows.push_back({static_cast<int>(f[0]), static_cast<int>(f[1]), static_cast<int>(f[2]), f[3] != 0, f[4] != 0,
                    f[5] != 0, static_cast<int>(f[6])});
  }
  return rows;
}

std::vector<Storage> storage_of(const std::vector<std::int64_t>& fields, std::size_t count) {
  check_fields(fields, count, kStorageFields, "places");
  std::vector<Storage> storage;
  for (auto f = fields.begin(); f != fields.end(); f += kStorageFields) {
    storage.push_back({at<void>(f[0]), at<void>(f[1]), at<float>(f[2]), at<float>(f[3]), at<std::int32_t>(f[4]),
                       at<std::int32_t>(f[5]), static_cast<int>(f[6])});
  }
  return storage;
}

void run_layers(LayerRunner& runner, int first, int last, Address hidden, int num_rows, std::vector<std::int64_t> rows,
                std::vector<Address> rotations, std::vector<std::int64_t> storage, int num_sequences, Address counts,
                std::int64_t stride, const std::vector<int>& count_places, int threads, bool then_others) {
  if (first < 0 || last < first || last > runner.num_layers() || num_rows < 0 || num_sequences < 0 || threads < 1) {
    throw std::invalid_argument("there are no such layers, rows, sequences or threads");
  }
  if (rotations.size() < 2 * std::size_t(runner.num_rotations())) {
    throw std::invalid_argument("layers name rotations that are not given");
  }
  std::vector<Rotation> of_rows;
  for (std::size_t i = 0; i + 1 < rotations.size(); i += 2) {
    of_rows.push_back({floats_at(rotations[i]), floats_at(rotations[i + 1])});
  }
  std::array<int, kLayerCounts> at_places;
  if (count_places.size() != at_places.size()) throw std::invalid_argument("each count needs a place");
  std::copy(count_places.begin(), count_places.end(), at_places.begin());
  const std::vector<Row> of_pass = rows_of(rows, num_rows, num_sequences);
  const std::vector<Storage> places = storage_of(storage, std::size_t(last - first) * num_sequences);
  nb::gil_scoped_release release;
  runner.run(first, last, at<float>(hidden), of_pass, of_rows, places, num_sequences,
             {at<std::int64_t>(counts), stride, at_places}, threads, then_others ? Next::kOthers : Next::kRun);
}

// Of the first thread, since `time_stages`.
nb::dict stage_seconds(LayerRunner& runner) {
  nb::dict seconds;
  for (int stage = 0; stage < kStages; ++stage) seconds[kStageNames[stage]] = runner.times().seconds[stage];
  return seconds;
}

// From the bits of a number.
Kept kept_in(int bits) {
  if (bits == 32) return Kept::kFloats;
  if (bits == 16) return Kept::kBfloat16;
  if (bits == 8) return Kept::kCodes;
  throw std::invalid_argument("entries are kept in 32, 16 or 8 bits");
}

// Attention alone, layer after layer: from queries [rows, heads, head_dim] of all layers to entries of each, into `out`,
// likewise. A row: its sequence, and the entries [first, end) that it sees. A place: addresses of a sequence's keys,
// values, their scales, and masses, in each layer. Returns what was left out, as counted.
std::vector<std::int64_t> attend(Address queries, Address out, int heads, int kv_heads, int head_dim, int entry_bits,
                                 const std::vector<std::int64_t>& rows, const std::vector<std::int64_t>& storage,
                                 int num_sequences, float scaling, float skip_below, float estimate_dims_above,
                                 float softcap, int threads) {
  constexpr int kFields = 3, kPlaces = 5;
  const std::size_t num_rows = rows.size() / kFields;
  if (heads < 1 || kv_heads < 1 || heads % kv_heads || head_dim < 1 || num_sequences < 1 || threads < 1) {
    throw std::invalid_argument("there are no such heads, sequences or threads");
  }
  check_fields(rows, num_rows, kFields, "rows");
  check_fields(storage, storage.size() / kPlaces / num_sequences * num_sequences, kPlaces, "places");
  const std::int64_t width = std::int64_t{kv_heads} * head_dim;
  const Kept kept = kept_in(entry_bits);
  std::vector<std::vector<Asking>> layers;
  int most = 1;
  for (auto s = storage.begin(); s != storage.end(); s += kPlaces * num_sequences) {
    std::vector<Asking>& layer = layers.emplace_back();
    for (std::size_t i = 0; i < num_rows; ++i) {
      const auto row = rows.begin() + i * kFields;
      if (row[0] < 0 || row[0] >= num_sequences || row[1] < 0 || row[2] <= row[1]) {
        throw std::invalid_argument("a row is of a sequence that there is not, or sees nothing");
      }
      const auto place = s + row[0] * kPlaces;
      const Entries entries{kept, at<void>(place[0]), at<void>(place[1]), at<float>(place[2]), at<float>(place[3]),
                            at<std::int32_t>(place[4]), width, std::int64_t{kv_heads} * scales_of(head_dim)};
      const std::size_t first = i * heads * head_dim;
      layer.push_back({floats_at(queries) + first, at<float>(out) + first, entries, static_cast<int>(row[1]),
                       static_cast<int>(row[2])});
      most = std::max(most, layer.back().end);
    }
  }
  nb::gil_scoped_release release;
  thread_local AttentionShare share;
  share.prepare({heads, kv_heads, head_dim}, static_cast<int>(num_rows), most, threads);
  AttentionShare& shared = share;
  std::vector<Skipped> skipped(threads);
  const FloatKernels& kernels = current_kernels().floats;
  const Attention attention{scaling, skip_below, estimate_dims_above, softcap};
  Pool::shared().run(threads, [&](int thread, Barrier& barrier) {
    for (const std::vector<Asking>& layer : layers) {
      skipped[thread] += shared.attend(kernels, attention, layer, thread);
      barrier.wait();
    }
  });
  Skipped all{};
  for (const Skipped& each : skipped) all += each;
  return {all.values, all.scores, all.scored_twice};
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  throw std::invalid_argument("no such activation: " + name);
}

LayerRunner* new_runner(std::vector<Layer> layers, int hidden, int inner, int heads, int kv_heads, int head_dim,
                        const std::string& activation, int entry_bits) {
  const Shape shape{hidden, inner, heads, kv_heads, head_dim, activation_of(activation), kept_in(entry_bits)};
  return new LayerRunner(shape, std::move(layers));
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Kernels over any-precision weights.";
  nb::set_leak_warnings(false);  // prepared matrices are kept for as long as their tensors, so to the interpreter's end
  nb::class_<Matrix>(m, "Matrix")
      .def(nb::new_(&new_matrix), "num_inputs"_a, "num_outputs"_a, "bits"_a, "group_size"_a, "unit"_a, "high"_a, "low"_a,
           "unit_stride"_a, "steps_kind"_a, "steps"_a, "offsets_kind"_a, "offsets"_a, "block_steps"_a,
           "block_offsets"_a, "scale_stride"_a, "zero"_a, "factor"_a)
      .def_ro("num_outputs", &Matrix::num_outputs);
  m.def("multiply_rows", &multiply_rows);
  m.def("attend", &attend);
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<>())
      .def("set_norm", &set_norm, "which"_a, "weight"_a, "bias"_a, "epsilon"_a)
      .def("set_map", &set_map, "map"_a, "matrix"_a, "bias"_a, "mean"_a, "bits"_a,
           "channel_bytes"_a)
      .def("join_maps", &join_maps, "attention"_a, "matrix"_a)
      .def("grade_map", &grade_map, "map"_a, "thresholds"_a, "levels"_a, "norms"_a)
      .def("set_shortcut", &set_shortcut, "attention"_a, "down"_a, "up"_a, "bias"_a, "rank"_a, "gate"_a,
           "log_threshold"_a)
      .def(
          "set_attention",
          [](Layer& layer, float scaling, float skip_below, float estimate_dims_above, float softcap) {
            layer.attention = {scaling, skip_below, estimate_dims_above, softcap};
          },
          "scaling"_a, "skip_below"_a, "estimate_dims_above"_a, "softcap"_a)
      .def("set_key_centre", [](Layer& layer, Address centre) { layer.key_centre = floats_at(centre); }, "centre"_a)
      .def(
          "set_place",
          [](Layer& layer, int window, int rotary) {
            layer.window = window;
            layer.rotary = rotary;
          },
          "window"_a, "rotary"_a)
      .def(
          "set_sublayers",
          [](Layer& layer, bool norms_projections, float residual_scale) {
            layer.norms_projections = norms_projections;
            layer.residual_scale = residual_scale;
          },
          "norms_projections"_a, "residual_scale"_a);
  nb::class_<LayerRunner>(m, "LayerRunner")
      .def(nb::new_(&new_runner), "layers"_a, "hidden"_a, "inner"_a, "heads"_a, "kv_heads"_a, "head_dim"_a,
           "activation"_a, "entry_bits"_a)
      .def("run", &run_layers)
      .def("time_stages", [](LayerRunner& runner) { runner.times() = StageTimes{true, {}}; })
      .def_prop_ro("stage_seconds", &stage_seconds);
  m.attr("COUNTS") = std::vector<std::string>(std::begin(kCountNames), std::end(kCountNames));
  m.def("instruction_sets", &available_instruction_sets);
  m.def("instruction_set", [] { return std::string(current_kernels().name); });
  m.def("use_instruction_set", &use_instruction_set, "name"_a);
}

}  // namespace quicksilver
