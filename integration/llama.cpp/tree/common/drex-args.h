#pragma once

#include "arg.h"

#include <vector>

// the --drex-* options of llama-server
std::vector<common_arg> common_drex_args(const common_params & params);
