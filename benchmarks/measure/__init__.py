"""How it is timed: the clocks of a CPU and a GPU, proofs, samples, processes, and the machine."""
