/* SPDX-License-Identifier: Apache-2.0 */
/* Loaded before Triton's library: a server whose backend API has another version. */

#include <stdint.h>

void *TRITONBACKEND_ApiVersion(uint32_t *major, uint32_t *minor) {
  *major = MAJOR;
  *minor = MINOR;
  return 0;
}
