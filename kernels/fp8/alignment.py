"""The sizes that FP8 products take. No torch import: checks of a run config ask here."""

FP8_MULTIPLE = 16  # elements: cuBLAS reads FP8 rows in pieces of 16 bytes
