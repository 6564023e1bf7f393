"""What a placement costs and which one is best: bytes, seconds and the integer program."""
