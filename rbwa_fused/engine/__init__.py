"""One pass over memory: segments, rows, counters, launches. Knows no torch.optim."""
