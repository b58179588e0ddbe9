"""What a job will have in memory, phase by phase, and whether that fits."""
