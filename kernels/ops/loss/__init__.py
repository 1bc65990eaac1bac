"""The projection to the vocabulary and its cross-entropy, also over a divided vocabulary."""
