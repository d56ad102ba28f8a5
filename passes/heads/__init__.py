"""What values of a graph are made of normalized heads, lane by lane, and where single elements come from."""
