"""What is typed: one file a command, without logic of its own."""
