"""llama.cpp and the plugin, as Python sees them."""
