"""The files pinfer makes of a model: where they are, what is in them, whether they are whole."""
