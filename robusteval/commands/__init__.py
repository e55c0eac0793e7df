"""The commands of the command line, a file each; nothing heavy is imported before it is needed."""
