"""What a run is made of, on disk and in numbers; without torch."""
