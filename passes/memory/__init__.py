"""Programs that take less memory at a time."""
