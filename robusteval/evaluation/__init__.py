"""Attacks run on a model and its defenses, judged image by image."""
