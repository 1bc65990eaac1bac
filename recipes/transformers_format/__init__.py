"""Our weights and configs under the names that transformers gives them."""
