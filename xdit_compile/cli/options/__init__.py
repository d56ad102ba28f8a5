"""What commands are asked: their flags, and the requests that these make."""
