#include "isa.h"

#include <atomic>
#include <stdexcept>

namespace quicksilver {
namespace {

bool runs_avx512() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

bool runs_avx2() {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

std::vector<const Kernels*> available() {
  std::vector<const Kernels*> found;
  if (avx512_kernels() && runs_avx512()) found.push_back(avx512_kernels());
  if (avx2_kernels() && runs_avx2()) found.push_back(avx2_kernels());
  found.push_back(portable_kernels());
  return found;
}

std::atomic<const Kernels*>& chosen() {
  static std::atomic<const Kernels*> kernels{available().front()};
  return kernels;
}

}  // namespace

std::vector<std::string> available_instruction_sets() {
  std::vector<std::string> names;
  for (const Kernels* kernels : available()) names.emplace_back(kernels->name);
  return names;
}

const Kernels& current_kernels() { return *chosen().load(); }

void use_instruction_set(const std::string& name) {
  for (const Kernels* kernels : available()) {
    if (name == kernels->name) {
      chosen().store(kernels);
      return;
    }
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here");
}

}  // namespace quicksilver
