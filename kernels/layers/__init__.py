"""The transformer layer, stacks of it, its projections and what backward computes again."""
