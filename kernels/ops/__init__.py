"""The ops of a layer: `x.py` is the contract and the reference, `x_triton.py` computes it on a GPU."""
