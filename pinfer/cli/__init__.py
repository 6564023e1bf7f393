"""The command line: flags, tables, progress bars, exit codes."""
