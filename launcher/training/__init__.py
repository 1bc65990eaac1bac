"""One run, from where it starts to its last step."""
