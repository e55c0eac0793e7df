"""Reports rendered from stored runs; nothing here imports torch."""
