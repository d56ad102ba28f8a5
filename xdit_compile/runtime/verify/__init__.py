"""Whether what runs gives what the module itself gives."""
