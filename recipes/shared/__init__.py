"""Parts and FLOPs that models share."""
