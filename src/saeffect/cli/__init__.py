"""The command line: one file a command group, thin over functions of the same names."""
