"""Labelled images in batches, from folders, files, arrays and packages."""
