"""Two threads for every test: the suite must mean the same on every machine."""

import torch

torch.set_num_threads(2)
