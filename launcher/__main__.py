"""`python -m xformer_train.launcher` is the console script `xformer-train`."""

from .cli import main

main()
