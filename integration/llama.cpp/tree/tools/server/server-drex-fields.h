#pragma once

#include "server-schema.h"

// the drex_* fields of a request; an empty list where early exit is off
void server_drex_add_fields(std::vector<std::unique_ptr<server_schema::field>> & fields, const common_params & params_base);

// throws std::invalid_argument for a drex_* field that there is not, or for any of them where early exit is off
void server_drex_check_fields(const json & data, const common_params & params_base);
