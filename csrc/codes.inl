// Included by kernels_*.cpp of vector units: from bytes of planes to bytes of codes, and from bits to their own code.
#include <type_traits>

#include "kernels.h"

namespace quicksilver {
namespace {

// Calls `run` with a number of bits, known to the compiler.
template <class Run>
[[gnu::always_inline]] inline void at_bits(int bits, const Run& run) {
  switch (bits) {
    case 8:
      return run(std::integral_constant<int, 8>());
    case 7:
      return run(std::integral_constant<int, 7>());
    case 6:
      return run(std::integral_constant<int, 6>());
    case 5:
      return run(std::integral_constant<int, 5>());
    case 4:
      return run(std::integral_constant<int, 4>());
    case 3:
      return run(std::integral_constant<int, 3>());
    case 2:
      return run(std::integral_constant<int, 2>());
    case 1:
      return run(std::integral_constant<int, 1>());
  }
}

// The bit of a byte that holds leading bit `bit` of a field's code, where the byte has taken each plane's pair.
constexpr int place_of_bit(int field, int bit) { return 2 * (field ^ (bit / 2)) + 1 - bit % 2; }

// A code's leading bits, put in order from bit 7 downwards, as GF2P8AFFINEQB takes a matrix of bits: byte 7 - i says
// which bits make up bit i.
constexpr std::uint64_t matrix_of(int field, int bits) {
  std::uint64_t matrix = 0;
  for (int bit = 0; bit < bits; ++bit) matrix |= std::uint64_t{1} << (8 * bit + place_of_bit(field, bit));
  return matrix;
}

// Unpacks codes read at some bits; of 4 and 2 bits, the levels that a table has for them. `V` names a vector of bytes
// and what is done with it.
template <class V, int Bits>
struct Unpack {
  using Bytes = typename V::Bytes;
  static constexpr int Planes = planes_of(Bits);
  static constexpr bool Table = Bits == 4 || Bits == 2;

  Bytes tables[2];

  explicit Unpack(const Levels& levels) {
    for (int i = 0; Table && i < 2; ++i) tables[i] = V::repeated(Bits == 4 ? levels.table4[i] : levels.table2[i]);
  }

  // `planes`: bytes of each plane; codes[field]: of the outputs whose bits they hold.
  [[gnu::always_inline]] void operator()(const Bytes* planes, Bytes* codes) const {
    Bytes even = planes[0], odd = planes[0];  // what fields 0 and 2 have taken, and fields 1 and 3
    if constexpr (Planes > 1) {
      even = V::template select<0x33>(planes[0], planes[1]);
      odd = V::template select<0xcc>(planes[0], planes[1]);
    }
    if constexpr (Table) {
      codes[0] = V::looked_up(tables[0], V::low_nibbles(even));
      codes[1] = V::looked_up(tables[1], V::low_nibbles(odd));
      codes[2] = V::looked_up(tables[0], V::high_nibbles(even));
      codes[3] = V::looked_up(tables[1], V::high_nibbles(odd));
    } else if constexpr (Planes > 2) {
      Bytes last_even = planes[2], last_odd = planes[2];
      if constexpr (Planes > 3) {
        last_even = V::template select<0x33>(planes[2], planes[3]);
        last_odd = V::template select<0xcc>(planes[2], planes[3]);
      }
      codes[0] = code<0>(V::template select<0x0f>(even, last_even));
      codes[1] = code<1>(V::template select<0x0f>(odd, last_odd));
      codes[2] = code<2>(V::template select<0xf0>(even, last_even));
      codes[3] = code<3>(V::template select<0xf0>(odd, last_odd));
    } else {
      codes[0] = code<0>(even);
      codes[1] = code<1>(odd);
      codes[2] = code<2>(even);
      codes[3] = code<3>(odd);
    }
  }

 private:
  template <int Field>
  [[gnu::always_inline]] Bytes code(Bytes taken) const {
    constexpr std::uint64_t matrix = matrix_of(Field, Bits);
    return matrix == matrix_of(3, kMaxBits) ? taken : V::template permuted<matrix>(taken);
  }
};

static_assert(matrix_of(3, kMaxBits) == 0x0102040810204080, "the last field's code is in order");

}  // namespace
}  // namespace quicksilver
