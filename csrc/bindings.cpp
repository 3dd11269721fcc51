// What Python sees: prepared matrices, and calls on rows and layers by address. Checks of shapes are the Python side's.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

#include "decoder.h"
#include "isa.h"
#include "matrix.h"
#include "names.h"
#include "pool.h"
#include "product.h"
#include "selection.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace quicksilver {
namespace {

using Bytes2 = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Addresses come from tensors that the Python side keeps alive; 0 is null.
using Address = std::uintptr_t;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

const float* floats_at(Address address) { return at<const float>(address); }

AnyPrecisionMatrix prepare(std::vector<Bytes2> planes, Bytes2 exponents, Bytes2 zeros, float largest, Floats1 table4,
                     Floats1 table2, int group_size, int num_outputs, bool by_channel) {
  if (planes.size() != kPlanes) throw std::invalid_argument("codes must have four planes");
  const std::size_t inputs = exponents.shape(0), run = (std::size_t(num_outputs) + 3) / 4;
  const std::size_t groups = (std::size_t(num_outputs) + group_size - 1) / group_size;
  for (const Bytes2& plane : planes) {
    if (plane.shape(0) != inputs || plane.shape(1) != run) throw std::invalid_argument("a plane has another shape");
  }
  if (exponents.shape(1) != groups || zeros.shape(0) != inputs || zeros.shape(1) != groups || table4.shape(0) != 16 ||
      table2.shape(0) != 4) {
    throw std::invalid_argument("scales or levels have another shape");
  }
  const StoredCodes codes{{planes[0].data(), planes[1].data(), planes[2].data(), planes[3].data()},
                          exponents.data(),
                          zeros.data(),
                          group_size,
                          largest,
                          table4.data(),
                          table2.data()};
  return AnyPrecisionMatrix(codes, static_cast<int>(inputs), num_outputs, by_channel ? Layout::kRuns : Layout::kQuads);
}

struct Rooms {
  std::vector<Coefficients> coefficients;  // of each thread
  std::vector<Selection> rows;
  Sharing sharing;
  std::vector<float> normed, y;
};

Rooms& rooms_of_caller() {
  thread_local Rooms rooms;
  return rooms;
}

// What is multiplied with a matrix: the same for all rows.
struct Operand {
  const AnyPrecisionMatrix& matrix;
  Norm norm;                   // of rows first; weight null for none
  const std::uint8_t* bits;  // [rows, in], or [rows], or null where `uniform` is every row's
  bool by_channel;
  int uniform, threads;

  BitsChoice bits_of(int row) const {
    BitsChoice found;
    found.uniform = bits && !by_channel ? bits[row] : uniform;
    if (by_channel) found.each = bits + std::size_t(row) * matrix.num_inputs();
    return found;
  }
};

// Multiplies rows [first, first + num_rows) of x, [rows, in], few enough for their selections to stay near.
void multiply_some(const Operand& by, const float* x, float* y, int first, int num_rows) {
  Rooms& rooms = rooms_of_caller();
  const FloatKernels& floats = current_kernels().floats;
  const int inputs = by.matrix.num_inputs(), outputs = by.matrix.num_outputs(), stride = by.matrix.padded_outputs();
  const bool direct = stride == outputs;
  if (rooms.coefficients.size() < std::size_t(by.threads)) rooms.coefficients.resize(by.threads);
  if (rooms.rows.size() < std::size_t(num_rows)) rooms.rows.resize(num_rows);
  if (!direct) rooms.y.resize(std::size_t(num_rows) * stride);
  x += std::size_t(first) * inputs;
  y += std::size_t(first) * outputs;
  for (int r = 0; r < num_rows; ++r) rooms.rows[r].prepare(inputs);
  if (by.norm.weight) {
    rooms.normed.resize(std::size_t(num_rows) * inputs);
    for (int r = 0; r < num_rows; ++r) {
      floats.norm(x + std::size_t(r) * inputs, inputs, by.norm, rooms.normed.data() + std::size_t(r) * inputs);
    }
    x = rooms.normed.data();
  }
  reserve({&by.matrix}, num_rows, rooms.sharing);
  float* out = direct ? y : rooms.y.data();
  const Product product{&by.matrix, rooms.rows.data(), num_rows, out, stride, nullptr};
  Pool::shared().run(by.threads, [&](int thread, Barrier& barrier) {
    const int blocks = Selection::blocks_of(inputs);
    for (int r = 0; r < num_rows; ++r) {
      rooms.rows[r].choose(floats, x + std::size_t(r) * inputs, by.matrix.base_scales(), inputs,
                           by.bits_of(first + r), blocks * thread / by.threads, blocks * (thread + 1) / by.threads);
    }
    multiply(&product, 1, rooms.sharing, {}, thread, by.threads, rooms.coefficients[thread], barrier);
  });
  for (int r = 0; !direct && r < num_rows; ++r) {
    std::copy_n(out + std::size_t(r) * stride, outputs, y + std::size_t(r) * outputs);
  }
}

// Multiplies float32 rows [num_rows, in], normed first where there is a norm's weight, into [num_rows, out]. Bits:
// uint8 [num_rows, in] by channel, [num_rows] otherwise, or null.
void multiply_rows(const AnyPrecisionMatrix& matrix, Address x, Address y, int num_rows, Address bits, bool by_channel,
                   int uniform, Address norm_weight, Address norm_bias, float epsilon, int threads) {
  if (threads < 1) throw std::invalid_argument("there must be a thread");
  if (by_channel && !(bits && matrix.layout() == Layout::kRuns)) {
    throw std::invalid_argument("the matrix is not laid out for bits by channel, or there are none");
  }
  nb::gil_scoped_release release;
  const Norm norm{floats_at(norm_weight), floats_at(norm_bias), epsilon};
  const Operand by{matrix, norm, at<const std::uint8_t>(bits), by_channel, uniform, threads};
  for (int first = 0; first < num_rows; first += kSlice) {
    multiply_some(by, floats_at(x), at<float>(y), first, std::min(kSlice, num_rows - first));
  }
}

LinearMap& map_of(Layer& layer, const std::string& name) {
  for (const Named& each : kMapNames) {
    if (name == each.name) return layer.maps[each.index];
  }
  throw std::invalid_argument("no such map: " + name);
}

void set_map(Layer& layer, const std::string& map, const AnyPrecisionMatrix& matrix, Address bias, Address mean,
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
  if (!linear.matrix || linear.matrix->layout() != Layout::kRuns) {
    throw std::invalid_argument("the matrix is not laid out for bits by channel");
  }
  linear.thresholds = std::move(thresholds);
  linear.levels = std::move(levels);
  linear.norms = floats_at(norms);
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

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  throw std::invalid_argument("no such activation: " + name);
}

// From the bits of a number.
Kept kept_in(int bits) {
  if (bits == 32) return Kept::kFloats;
  if (bits == 16) return Kept::kBfloat16;
  if (bits == 8) return Kept::kCodes;
  throw std::invalid_argument("entries are kept in 32, 16 or 8 bits");
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
  nb::class_<AnyPrecisionMatrix>(m, "AnyPrecisionMatrix")
      .def_prop_ro("num_inputs", &AnyPrecisionMatrix::num_inputs)
      .def_prop_ro("num_outputs", &AnyPrecisionMatrix::num_outputs)
      .def_prop_ro("nbytes", &AnyPrecisionMatrix::nbytes);
  m.def("prepare", &prepare, "planes"_a, "exponents"_a, "zeros"_a, "largest"_a, "table4"_a, "table2"_a, "group_size"_a,
        "num_outputs"_a, "by_channel"_a);
  m.def("multiply_rows", &multiply_rows);
  nb::class_<Layer>(m, "Layer")
      .def(nb::init<>())
      .def("set_norm", &set_norm, "which"_a, "weight"_a, "bias"_a, "epsilon"_a)
      .def("set_map", &set_map, "map"_a, "matrix"_a, "bias"_a, "mean"_a, "bits"_a,
           "channel_bytes"_a)
      .def("grade_map", &grade_map, "map"_a, "thresholds"_a, "levels"_a, "norms"_a)
      .def("set_shortcut", &set_shortcut, "attention"_a, "down"_a, "up"_a, "bias"_a, "rank"_a, "gate"_a,
           "log_threshold"_a)
      .def(
          "set_attention",
          [](Layer& layer, float scaling, float skip_below, float estimate_dims_above, float softcap) {
            layer.attention = {scaling, skip_below, estimate_dims_above, softcap};
          },
          "scaling"_a, "skip_below"_a, "estimate_dims_above"_a, "softcap"_a)
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
      .def("run", &run_layers);
  m.attr("COUNTS") = std::vector<std::string>(std::begin(kCountNames), std::end(kCountNames));
  m.def("instruction_sets", &available_instruction_sets);
  m.def("instruction_set", [] { return std::string(current_kernels().name); });
  m.def("use_instruction_set", &use_instruction_set, "name"_a);
}

}  // namespace quicksilver
