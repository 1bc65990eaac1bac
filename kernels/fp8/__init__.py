"""FP8: scales, casts and products with FP8 operands."""
