"""What the tests share and is no test: the command line, servers, writers of models and checkpoints."""
