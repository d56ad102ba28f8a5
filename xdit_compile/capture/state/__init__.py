"""What hangs on a module, and whether a call of it is the one that was captured."""
