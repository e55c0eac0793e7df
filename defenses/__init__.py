"""Defenses: hardened models and detectors; `robusteval.registry` finds them by name."""
