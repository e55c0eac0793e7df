"""Ways to move an image inside a ball, and what is lowered on the way."""
