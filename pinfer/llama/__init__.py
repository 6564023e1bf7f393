"""Python bindings of llama.cpp, ggml and the plugin."""
