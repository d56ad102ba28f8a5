"""One rank of the long-lived pair: runs the cells that it is asked for, one after the other."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import gc
import logging
import os
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pretend
import torch
import torch.distributed as dist
from conformance.case import REQUESTS, OneImage
from conformance.cases import CASES
from conformance.compare import TOLERANCE, Difference, compare, plain
from conformance.observe import BrokenCase, Reference, Subject, observe, reference
from conformance.plans import images_of, nothing_to_split, plan_of, section_of
from conformance.verdicts import Answer, Verdict
from conformance.work import components, counted
from conformance.work import share as work_share
from torch import nn
from tqdm import tqdm

import xdit_compile
from xdit_compile.errors import AgreementError, VerificationError, XditCompileError, one_line

MAGNIFIED = 4.0
"""A difference may be as many times what the last bit of the weights makes, where that is more than `TOLERANCE`."""


def serve(rank: int, folder: str, asked: Connection, timeout_s: float, device: str = "cpu") -> None:
    """Answer (case, plan) with an `Answer` until None comes or the other end is gone, all on a device of each rank."""
    _quiet(f"{folder}/{rank}.log")
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=timeout_s)
    place, backend = placed(device, rank)
    dist.init_process_group(backend, init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=limit)
    asked.send("ready")
    while (cell := _next(asked)) is not None:
        asked.send(answer(*cell, rank, timeout_s, place))
    os._exit(0)


def placed(device: str, rank: int) -> tuple[str, str]:
    """A rank's device of this type, made the current one, and what carries its collectives."""
    if device == "cpu":
        return device, "gloo"
    if device == pretend.NAME:
        pretend.start()
    torch.accelerator.set_device_index(rank % torch.accelerator.device_count())
    return f"{device}:{torch.accelerator.current_device_index()}", pretend.BACKENDS.get(device, "gloo")


def _next(asked: Connection) -> tuple[str, str] | None:
    try:
        return asked.recv()
    except EOFError:
        return None


def _quiet(log: str) -> None:
    """What libraries print goes to a file: nobody reads it but after a crash. No lock of its own outlives a process."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    tqdm.set_lock(threading.RLock())


def answer(case: str, plan: str, rank: int, timeout_s: float, device: str = "cpu") -> Answer:
    """The verdict of one cell on this rank."""
    begin = time.perf_counter()
    try:
        found = _judged(CASES[case], plan, timeout_s, device) if _splits(case, plan) else _nothing(case)
    except OneImage as error:
        found = Answer(Verdict.INAPPLICABLE, f"one image: {one_line(error)}")
    except BrokenCase as error:
        found = Answer(Verdict.CRASHED, f"unsplit: {one_line(error)}")
    gc.collect()
    seconds, (subject, modules) = time.perf_counter() - begin, _classes(case)
    return dataclasses.replace(found, seconds=seconds, subject=subject, modules=modules)


def _splits(case: str, plan: str) -> bool:
    """Whether there is anything of what the plan splits."""
    return CASES[case].section in ("", section_of(plan))


def _nothing(case: str) -> Answer:
    return Answer(Verdict.INAPPLICABLE, "an autoencoder alone" if CASES[case].section == "coding" else "no autoencoder")


@functools.lru_cache(maxsize=2)
def _classes(case: str) -> tuple[str, tuple[str, ...]]:
    """The class of a case's pipeline, and of the networks that it holds."""
    try:
        pipe = CASES[case].build()
    except Exception:  # noqa: BLE001 - the verdict says so already
        return "", ()
    networks = {type(part).__name__ for part in components(pipe).values() if isinstance(part, nn.Module)}
    return type(pipe).__name__, tuple(sorted(networks))


@functools.lru_cache(maxsize=4)
def _expected(case: str, images: int, device: str) -> Reference:
    return reference(CASES[case], images, device)


def _judged(case: Subject, plan: str, timeout_s: float, device: str) -> Answer:
    """Ranks that are said to disagree were given the same, and numbers that verification found to be others are none of
    the request's doing: neither is a refusal."""
    whole = _expected(case.name, images_of(plan), device)
    idle = nothing_to_split(plan, whole)
    pipe = case.build(device)
    try:
        xdit_compile.parallelize(pipe, plan_of(plan, case.steps, timeout_s))
        differences = list(_differences(case, pipe, plan, whole))
        work = _work(case, pipe, plan, whole)
        xdit_compile.restore(pipe)
    except VerificationError as error:
        return Answer(Verdict.WRONG, _said(error))
    except AgreementError as error:
        return Answer(Verdict.CRASHED, _said(error))
    except XditCompileError as error:
        return Answer(Verdict.INAPPLICABLE, idle) if idle else Answer(Verdict.REFUSED, _said(error))
    except Exception as error:  # noqa: BLE001 - whatever it was, it is the verdict
        traceback.print_exc()
        return Answer(Verdict.CRASHED, _said(error))
    far = tuple(each.greatest for each in differences)
    allowed = max(TOLERANCE, MAGNIFIED * whole.rounding)
    wrong = [f"request {at}: {each}" for at, each in enumerate(differences) if not each.within(allowed)]
    return Answer(Verdict.WRONG if wrong else Verdict.EXACT, "; ".join(wrong), far, whole.rounding, work=work)


def _said(error: Exception) -> str:
    """The error with the place where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" [{os.path.basename(frames[-1].filename)}:{frames[-1].lineno}]" if frames else ""
    return f"{type(error).__name__}: {one_line(error)}{place}"


def _differences(case: Subject, pipe: Any, plan: str, whole: Reference) -> Iterator[Difference]:
    """Of both requests, and of the first in floats where these were not seen."""
    images = images_of(plan)
    for request in REQUESTS:
        parts, expected = observe(case, pipe, request, images).parts, whole.results[request].parts
        difference = Difference()
        compare(parts["result"], expected["result"], difference)
        compare(parts["floats"], expected["floats"], difference, "floats")
        yield difference
    if whole.unrounded is not None:
        difference = Difference()
        found = plain(case.unrounded(pipe, REQUESTS[0], images))
        compare(found, whole.unrounded, difference, "unrounded")
        yield difference


def _work(case: Subject, pipe: Any, plan: str, whole: Reference) -> float | None:
    """The first request counted, once its programs are made."""
    observe(case, pipe, REQUESTS[0], images_of(plan))
    with counted(pipe) as work:
        observe(case, pipe, REQUESTS[0], images_of(plan))
    return work_share(work, whole.work, section_of(plan))
