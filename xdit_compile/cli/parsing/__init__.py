"""How commands are read: flags in groups, from a command line, variables or a file; what is said of wrong ones."""
