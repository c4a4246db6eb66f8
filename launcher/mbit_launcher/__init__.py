"""Start a run: on this machine now, on SLURM later."""
