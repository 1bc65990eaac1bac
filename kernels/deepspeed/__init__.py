"""DeepSpeed's transformer layer by its own names, computed by the kernels of this project."""
