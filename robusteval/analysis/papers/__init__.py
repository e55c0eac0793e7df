"""What papers have published, and whether it is found again: declared in files, measured anew."""
