"""What this machine has, and what of this project works on it."""
