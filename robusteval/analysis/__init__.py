"""What attacks do to images, to regions of them and to units of a network."""
