"""Classifiers on [0, 1] images: from a file, from a name, and what is known of each."""
