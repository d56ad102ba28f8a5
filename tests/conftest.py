"""Settings for every test process."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from xdit_compile.cli.processes.speech import as_found


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Tests run beside one another, so each has one thread. Every pass is checked, and nothing kept."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["XDIT_COMPILE_CHECK"] = "1"
    os.environ["XDIT_COMPILE_CACHE"] = "off"
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def logs_as_found() -> Iterator[None]:
    """What a part of a command does to logs in the process of a test ends with the test."""
    with as_found():
        yield
