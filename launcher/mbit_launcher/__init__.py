"""Start a run: on this machine, or on a SLURM cluster."""
