// The definition in plain C++, and what runs where no vector unit is known.
#include <cmath>
#include <cstring>

#include "floats.inl"
#include "kernels.h"

namespace quicksilver {

const float kFractions[16] = {1.0f,         0.957603281f, 0.917004043f, 0.878126080f, 0.840896415f, 0.805245166f,
                              0.771105413f, 0.738413073f, 0.707106781f, 0.677127773f, 0.648419777f, 0.620928906f,
                              0.594603558f, 0.569394317f, 0.545253866f, 0.522136891f};

const std::uint16_t kMultipliers[32] = {31379, 30048, 28774, 27554, 26386, 25268, 24196, 23170, 22188, 21247, 20347,
                                        19484, 18658, 17867, 17109, 16384, 31379, 30048, 28774, 27554, 26386, 25268,
                                        24196, 23170, 22188, 21247, 20347, 19484, 18658, 17867, 17109, 16384};

namespace {

// Levels of a channel's codes, [outputs], as `bits` bits tell them but for the offset.
void unpack_channel(const Tile& tile, const Levels& levels, std::uint32_t channel, int bits,
                                     std::uint8_t* codes) {
  const std::uint8_t* table = bits == 4 ? levels.table4[1] : bits == 2 ? levels.table2[0] : nullptr;
  const int outputs = tile.outputs(), dropped = 2 * planes_of(bits) - bits;
  for (int o = 0; o < outputs; ++o) {
    int code = 0;
    for (int p = 0; p < planes_of(bits); ++p) {
      code = code << 2 | (tile.planes[p][tile.offset(p, channel, o)] >> (2 * (field_of(o) ^ p)) & 3);
    }
    code >>= dropped;
    codes[o] = static_cast<std::uint8_t>(table ? table[code] : code << (kMaxBits - bits));
  }
}

// The chunk's activations times scales, as integers in one unit.
void make_coefficients(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c) {
  c.scale = chunk.unit * levels.unit;
  for (int g = 0; g < 4 * tile.halves; ++g) {
    std::int32_t zero_sum = 0;
    float offset = 0.0f;
    int j = 0;
    for (const Part* part = chunk.parts; part < chunk.parts + chunk.num_parts; ++part) {
      std::int32_t sum = 0;
      for (const int end = j + part->slots; j < end; ++j) {
        const std::uint8_t* record = tile.record(chunk.channels[j]);
        const std::int32_t q = coefficient_of(chunk.x[j], record[g]);
        c.words[j * kTileGroups + g] = q;
        zero_sum += q * record[kTileGroups + g];
        sum += q;
      }
      offset += static_cast<float>(sum) * levels.offset[part->bits];
    }
    c.zero_sums[g] = zero_sum;
    c.offsets[g] = c.scale * offset;
  }
}

void tile_chunk(const Tile& tile, const Chunk& chunk, const Levels& levels, Coefficients& c, bool adds, float* y,
                Upcoming&) {
  make_coefficients(tile, chunk, levels, c);
  std::int32_t sums[kTileOutputs] = {};
  std::uint8_t codes[kTileOutputs];
  int j = 0;
  for (const Part* part = chunk.parts; part < chunk.parts + chunk.num_parts; ++part) {
    for (const int end = j + part->slots; j < end; ++j) {
      unpack_channel(tile, levels, chunk.channels[j], part->bits, codes);
      for (int o = 0; o < tile.outputs(); ++o) sums[o] += c.words[j * kTileGroups + o / kLaneOutputs] * codes[o];
    }
  }
  for (int o = 0; o < tile.outputs(); ++o) {
    const int g = o / kLaneOutputs;
    const float share = c.scale * static_cast<float>(sums[o] - c.zero_sums[g]) + c.offsets[g];
    y[o] = adds ? y[o] + share : share;
  }
}

const Kernels kPortable = {"portable", tile_chunk, kFloats};

}  // namespace

const Kernels* portable_kernels() { return &kPortable; }

}  // namespace quicksilver
