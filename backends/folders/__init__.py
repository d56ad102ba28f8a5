"""The folders in which compilers make files."""
