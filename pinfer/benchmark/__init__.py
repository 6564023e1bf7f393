"""What `pinfer bench` is made of: worker processes, limits and reports."""
