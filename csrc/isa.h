// Which instruction set the kernels use: the best that the processor has, or one that was asked for.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace quicksilver {

// Names of those that this build and this processor have, best first.
std::vector<std::string> available_instruction_sets();

const Kernels& current_kernels();

// Throws std::invalid_argument where it is not available.
void use_instruction_set(const std::string& name);

}  // namespace quicksilver
