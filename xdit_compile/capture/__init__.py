"""From a module and a call of it to a program that was seen to agree."""
