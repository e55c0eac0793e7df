"""Attack functions as ART attacks, and ART attacks as functions."""
