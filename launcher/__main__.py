"""`python -m xformer_train.launcher` is the console script `xformer-train`."""

from .commands.app import main

main()
