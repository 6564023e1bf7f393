// buffer.h: the plugin's buffer type: host memory in ggml's standard layout, or a mapped model file. A buffer knows the model
// whose weights it holds.
#pragma once

#include "ggml-backend.h"
#include "model.h"

#include <memory>

ggml_backend_buffer_type_t pinfer_buffer_type(ggml_backend_dev_t device);

// Null where there is no memory, or where the model that the pages are mapped from must not be loaded.
ggml_backend_buffer_t pinfer_buffer_from_host(ggml_backend_dev_t device, void * data, size_t size);

// Model of a weight that lies in a buffer of the plugin. While a model loads, a weight has no buffer yet, or an empty one of the
// type that is being tried: then it is the model whose file is open and has such a tensor. Experts without exact zeros lie
// elsewhere: then it is a model that has some experts of such a stack on a device. Null where none of it is so.
std::shared_ptr<pinfer_model> pinfer_model_of_weight(const ggml_tensor * weight);

// Whether a weight lies in a buffer that is llama.cpp's own, and that the CPU computes from.
bool pinfer_weight_is_elsewhere(const ggml_tensor * weight);

// Model of which these bytes, outside the plugin's buffers, are a mapped part. Null where they are not.
std::shared_ptr<pinfer_model> pinfer_model_mapped_at(const void * data);

// Gives back the memory that a weight's pages take, where they are a mapped file; they are read again when touched.
void pinfer_weight_release_pages(const ggml_tensor * weight);
