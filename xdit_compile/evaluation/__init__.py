"""How good are the pictures? Scenes that can be described, drawn and checked, and distances between pictures."""
