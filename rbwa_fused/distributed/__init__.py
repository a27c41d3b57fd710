"""Training on several processes: what PyTorch's wrappers leave to do.

DistributedDataParallel needs nothing from here: a step adds no collective, and equal gradients make
equal weights and averages. These are for uneven inputs (`Joined`, `synchronize`), for state that is
sharded over the ranks (`ZeroRedundancyOptimizer`, `averaged`) and for replicas in processes of
their own (`Elastic`).
"""

from rbwa_fused.distributed.elastic import Elastic
from rbwa_fused.distributed.shares import averaged
from rbwa_fused.distributed.states import Joined, synchronize
from rbwa_fused.distributed.zero import ZeroRedundancyOptimizer

__all__ = ["Elastic", "Joined", "ZeroRedundancyOptimizer", "averaged", "synchronize"]
