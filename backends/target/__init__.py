"""Cards that are not there: code generated and compiled for them on any machine."""
