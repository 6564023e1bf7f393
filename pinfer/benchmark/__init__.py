"""The parts of `pinfer bench`: worker processes, speed limits and reports."""
