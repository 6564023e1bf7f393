"""Support for the tests: the command line, servers, writers of models and checkpoints."""
