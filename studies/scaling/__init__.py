"""What averages of weights cost on many GPUs, on paper: see README.md."""
