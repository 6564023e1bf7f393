// pinfer_steps.h: where the time of a token goes, for pinfer bench --steps.
#pragma once

#include "pinfer.h"

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_tensor;

// From a start on, FFNs read the clock between their steps; every start begins at zero.
PINFER_API void pinfer_steps_start(void);
// The name of a step, and its seconds as the thread that decodes saw them; NULL beyond the last step.
PINFER_API const char * pinfer_steps_get(int32_t step, double * seconds);
// For cb_eval of a context: counts the nodes that ggml computes, which are then computed one by one.
PINFER_API bool pinfer_steps_eval(struct ggml_tensor * node, bool ask, void * user_data);

#ifdef __cplusplus
}
#endif
