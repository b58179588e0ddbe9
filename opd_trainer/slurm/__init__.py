"""SLURM: what is submitted, how it is watched, and what runs in the job."""
