"""The Triton backend: update.h mirrored (update.py), and the launch of it (step.py).

Importing this package does not import triton; the first step that runs here does.
"""
