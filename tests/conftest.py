"""Settings for every test process."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests run beside one another, so each has one thread. Every pass is checked, and nothing kept."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["XDIT_COMPILE_CHECK"] = "1"
    os.environ["XDIT_COMPILE_CACHE"] = "off"
    torch.set_num_threads(1)
