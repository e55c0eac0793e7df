"""What a network looks at: maps of importance, one file per family."""
