// SPDX-License-Identifier: Apache-2.0
//
// drex.hpp: drex.h for C++17, header only.
//
// What it adds to drex.h, which stays the specification of what every call does:
//
//   engine, step, pages   own what they stand for. A step that goes out of scope
//                         before complete() is abandoned, so that an early return
//                         or an exception of the host's loses no row.
//   result<T>             a value, or an error with its status and text. Nothing
//                         here throws. With DREX_HPP_EXCEPTIONS defined before the
//                         header is included, result<T>::value() exists, and
//                         throws drex::exception for an error.
//   span<T>               pointer and length, from arrays, vectors and the like.
//   config, request, ...  drex.h's structs, initialized.
//   log_set, trace_write  take a callable in place of a function and a void *.
//
// What it leaves out: engine::ready() has no n_kv, a hint that drex does not use.
//
// No call allocates but what allocates in drex.h, and an error's text. Works with
// -fno-exceptions and -fno-rtti. Since 0.1.

#ifndef DREX_HPP
#define DREX_HPP

#include "drex.h"

#if !defined(_MSVC_LANG) && __cplusplus < 201703L
#error "drex.hpp needs C++17; drex.h works from C++11 on"
#endif

#include "drex/detail/engine.hpp"
#include "drex/detail/pages.hpp"

namespace drex {

// drex_speculate(): speculative sampling. An empty `draft`: its token was certain.
inline result<std::int32_t> speculate(span<const float> deep, span<const float> draft,
                                      std::int32_t draft_token, double u, double v) {
  if (!draft.empty() && draft.size() != deep.size()) {
    return error(DREX_ERROR_INVALID_ARGUMENT,
                 "speculate: draft has " + std::to_string(draft.size()) +
                     " elements; expected as many as deep, " +
                     std::to_string(deep.size()));
  }
  std::int32_t token = 0;
  const drex_status s =
      drex_speculate(deep.data(), draft.empty() ? nullptr : draft.data(),
                     detail::count(deep.size()), draft_token, u, v, &token);
  if (s != DREX_OK) return error::last(s);
  return token;
}

}  // namespace drex

#endif  // DREX_HPP
