"""What can be typed: one file for each command, its flags and what is refused before anything heavy."""
