"""Models, checkpoints and texts of the Hugging Face hub."""
