"""Put our layer into a Hugging Face model and take it out again, by its policy."""
