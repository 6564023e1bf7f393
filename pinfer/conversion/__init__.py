"""Checkpoints and PowerInfer files to GGUF: one module a concern, one entry a family."""
