"""Runs operators, each once: what was found is kept in a folder, a file for each operator."""

from __future__ import annotations

import dataclasses
import json
import logging
import warnings
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.testing._internal.opinfo.core import OpInfo

from .samples import cases, label, operators
from .splits import Outcome, tried


def run(infos: Iterable[OpInfo], folder: Path, most: int, jobs: int, done: Callable[[str], None]) -> list[Outcome]:
    """The outcomes of operators in their order; those that the folder has are not run again."""
    folder.mkdir(parents=True, exist_ok=True)
    names = [label(info) for info in infos]
    known = [name for name in names if _file(folder, name).exists()]
    for name in known:
        done(name)
    missing = [(name, folder, most) for name in names if name not in known]
    with get_context("spawn").Pool(jobs, _quiet, maxtasksperchild=40) as pool:
        for name in pool.imap_unordered(_work, missing):
            done(name)
    return [Outcome(**each) for name in names for each in json.loads(_file(folder, name).read_text())]


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _work(given: tuple[str, Path, int]) -> str:
    name, folder, most = given
    (info,) = operators([name])
    outcomes = [dataclasses.asdict(tried(case)) for case in cases(info, most)]
    _file(folder, name).write_text(json.dumps(outcomes))
    return name
