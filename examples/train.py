"""Trains a small network on real digit images with every method and compares them.

    python -m examples.train                      # all methods, 3 seeds
    python -m examples.train --method rbwa,rbwa-control --dtype float64
    python -m examples.train --help

Needs scikit-learn, matplotlib and tqdm beside PyTorch. Writes results.json after every finished
run, then a table and curves.png. Ctrl-C keeps what is finished.
"""

from __future__ import annotations

import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

if __package__ is None:  # run as a file: the folder above holds the package
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import sklearn
import torch
from tqdm import tqdm

import rbwa_fused
from examples import data, models, options, plot, report, timing, training
from examples.methods import METHODS
from examples.options import Settings
