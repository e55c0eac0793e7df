"""Robustness evaluation and defense of image classifiers."""

__version__ = "0.1.0"
