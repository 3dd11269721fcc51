// What Python sees: prepared matrices, and calls on raw float32 rows. Checks of shapes are the Python side's.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "isa.h"
#include "matrix.h"
#include "pool.h"
#include "product.h"
#include "selection.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace quicksilver {
namespace {

using Bytes2 = nb::ndarray<const std::uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats1 = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

NestedMatrix prepare(std::vector<Bytes2> planes, Bytes2 exponents, Bytes2 zeros, float largest, Floats1 table4,
                     Floats1 table2, int group_size, int num_outputs) {
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
  return NestedMatrix(codes, static_cast<int>(inputs), num_outputs);
}

struct Rooms {
  std::vector<ThreadRoom> threads;
  std::vector<Selection> rows;
  std::vector<float> y;
};

Rooms& rooms_of_caller() {
  thread_local Rooms rooms;
  return rooms;
}

void multiply_rows(const NestedMatrix& matrix, ConstRows x, Rows y, nb::object widths, int uniform, int threads) {
  const int num_rows = static_cast<int>(x.shape(0)), inputs = matrix.num_inputs(), outputs = matrix.num_outputs();
  if (x.shape(1) != std::size_t(inputs) || y.shape(0) != x.shape(0) || y.shape(1) != std::size_t(outputs)) {
    throw std::invalid_argument("rows do not fit the matrix");
  }
  const std::uint8_t* each = nullptr;
  Bytes2 given;
  if (!widths.is_none()) {
    given = nb::cast<Bytes2>(widths);
    if (given.shape(0) != x.shape(0) || given.shape(1) != std::size_t(inputs)) {
      throw std::invalid_argument("widths do not fit the rows");
    }
    each = given.data();
  }
  nb::gil_scoped_release release;
  Rooms& rooms = rooms_of_caller();
  if (rooms.threads.size() < std::size_t(threads)) rooms.threads.resize(threads);
  if (rooms.rows.size() < std::size_t(num_rows)) rooms.rows.resize(num_rows);
  const int stride = matrix.padded_outputs();
  const bool direct = stride == outputs;
  if (!direct) rooms.y.resize(std::size_t(num_rows) * stride);
  for (int r = 0; r < num_rows; ++r) {
    Widths row;
    row.uniform = uniform;
    if (each) row.each = each + std::size_t(r) * inputs;
    rooms.rows[r].choose(x.data() + std::size_t(r) * inputs, inputs, row);
  }
  float* out = direct ? y.data() : rooms.y.data();
  const std::vector<Product> products{{&matrix, rooms.rows.data(), num_rows, out, stride, nullptr}};
  Pool::shared().run(threads, [&](int thread, Barrier& barrier) {
    multiply(products, thread, threads, rooms.threads.data(), barrier);
  });
  if (direct) return;
  for (int r = 0; r < num_rows; ++r) {
    std::copy_n(out + std::size_t(r) * stride, outputs, y.data() + std::size_t(r) * outputs);
  }
}

}  // namespace

NB_MODULE(_native, m) {
  m.doc() = "Kernels over nested weights.";
  nb::set_leak_warnings(false);  // prepared matrices are kept for as long as their tensors, so to the interpreter's end
  nb::class_<NestedMatrix>(m, "NestedMatrix")
      .def_prop_ro("num_inputs", &NestedMatrix::num_inputs)
      .def_prop_ro("num_outputs", &NestedMatrix::num_outputs)
      .def_prop_ro("nbytes", &NestedMatrix::nbytes);
  m.def("prepare", &prepare, "planes"_a, "exponents"_a, "zeros"_a, "largest"_a, "table4"_a, "table2"_a, "group_size"_a,
        "num_outputs"_a);
  m.def("multiply_rows", &multiply_rows, "matrix"_a, "x"_a, "y"_a, "widths"_a.none(), "uniform"_a, "threads"_a);
  m.def("instruction_sets", &available_instruction_sets);
  m.def("instruction_set", [] { return std::string(current_kernels().name); });
  m.def("use_instruction_set", &use_instruction_set, "name"_a);
}

}  // namespace quicksilver
