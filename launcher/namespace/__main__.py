"""`python -m xformer_train` is the console script `xformer-train`. This folder installs as the namespace itself."""

import runpy

runpy.run_module("xformer_train.launcher", run_name="__main__", alter_sys=True)
