"""pinfer: neuron-aware inference for ReLU language models on today's llama.cpp."""

__version__ = "0.1.0"
