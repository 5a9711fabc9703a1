"""Jobs of cluster engines: SLURM, Kubernetes, SkyPilot and Ray start the ranks of a run."""
