// dense.h: whole products and activations of an FFN.
#pragma once

#include "model.h"
#include "nodes.h"
#include "sparse.h"
#include "team.h"

// Bias of a product as F32, whatever its type in the file; null where the product has none. The model's mutex is held.
const float * pinfer_dense_bias(pinfer_model * m, const ggml_tensor * bias);
// out [n_tokens, n] = in + bias
void pinfer_dense_add(const pinfer_team * team, const float * in, const float * bias, int64_t n, int64_t n_tokens, float * out);
// The matrix of a product as rows; kernel is null where its type has none
pinfer_rows pinfer_model_rows(pinfer_model * m, const pinfer_product & p);
// A product of all rows, from x [n_tokens, n] into p.out()
ggml_status pinfer_dense_product(pinfer_team * team, pinfer_model * m, const pinfer_product & p, const float * x);
// All of these neurons for every token: whole first products, then the down rows of what is not zero
ggml_status pinfer_dense_neurons(pinfer_team * team, const pinfer_ffn & f, const pinfer_neurons & neurons, const pinfer_rule & rule,
                                 const float * x);
// The FFN from the model's own matrices; what fires is counted. With experts by the graph's own nodes but the activation
ggml_status pinfer_dense_ffn(pinfer_team * team, pinfer_model * m, const pinfer_ffn & f, const pinfer_rule & rule);
// Where the tokens of a stack are routed to
pinfer_routes pinfer_routes_of(const pinfer_ffn & f);
// f.h from f.gate.out() and f.up.out()
void pinfer_dense_activation(const pinfer_team * team, const pinfer_ffn & f, const pinfer_rule & rule);
