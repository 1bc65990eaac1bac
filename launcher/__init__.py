"""How a run is carried out: command line, run config, processes, DeepSpeed engine, optimizer, checkpoints, metrics."""
