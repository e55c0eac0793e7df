"""Published attacks, one file per family; `robusteval.registry` finds them by name."""
