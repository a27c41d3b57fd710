"""``python -m rbwa_fused.merge`` merges checkpoints: posthoc/merge_command.py."""

from __future__ import annotations

import sys
from typing import Any

from rbwa_fused import policies
from rbwa_fused.command import run
from rbwa_fused.posthoc.merge_command import NAME, main

if __name__ == "__main__":
    sys.exit(run(NAME, main))
modules: dict[str, Any] = sys.modules
modules[__name__] = policies.merge  # rbwa_fused.merge is the policy, also once this was imported
