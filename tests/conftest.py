"""Two threads for every test: the suite must mean the same on every machine."""

import os
from collections.abc import Iterator

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve a busy machine
pytest.register_assert_rewrite("agreement", "emulation", "side_by_side", "training")

import torch  # noqa: E402 (reads that variable)
from emulation import emulated_cuda  # noqa: E402, F401 (a fixture for all)

torch.set_num_threads(2)


@pytest.fixture
def process_group() -> Iterator[None]:
    """This process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
