"""GGUF files, read and written as streams."""
