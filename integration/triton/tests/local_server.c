/* SPDX-License-Identifier: Apache-2.0 */
/* Next to nothing of Triton's API, in a library that a program loads for itself. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct error {
  uint32_t code;
  char text[512];
};

void *TRITONSERVER_ErrorNew(uint32_t code, const char *text) {
  struct error *error = calloc(1, sizeof *error);
  error->code = code;
  strncpy(error->text, text, sizeof error->text - 1);
  return error;
}

void TRITONSERVER_ErrorDelete(void *error) { free(error); }

uint32_t TRITONSERVER_ErrorCode(void *error) { return ((struct error *)error)->code; }

const char *TRITONSERVER_ErrorMessage(void *error) { return ((struct error *)error)->text; }

void *TRITONBACKEND_ApiVersion(uint32_t *major, uint32_t *minor) {
  *major = 1;
  *minor = 15;
  return 0;
}
