"""What is told of a call that is made ready, to logs and to other ranks, and where the time of a request went."""

from __future__ import annotations

import logging
import re

import pytest
import torch
from torch import nn

import xdit_compile
from xdit_compile import Plan
from xdit_compile.runtime.stored import progress
from xdit_compile.runtime.stored.progress import Phase, Progress, Times


def test_a_user_of_the_library_has_a_line_for_each_phase(caplog: pytest.LogCaptureFixture):
    module = xdit_compile.parallelize(nn.Linear(4, 4).eval(), Plan(backend="eager", cache=None))
    with caplog.at_level(logging.INFO, "xdit_compile"), xdit_compile.generation(module):
        module(torch.ones(2, 4))
        module(torch.ones(2, 4))
    lines = [record.getMessage() for record in caplog.records if record.name == "xdit_compile.progress"]
    assert lines == ["module: capturing", "module: passes", "module: checking"]
    (times,) = [record.getMessage() for record in caplog.records if record.name == "xdit_compile.times"]
    assert re.search(r"\d\.\d s$", times)


def test_others_are_told_what_a_rank_does_and_when_it_is_over(caplog: pytest.LogCaptureFixture):
    told: list[tuple[str, bool]] = []
    shown = Progress("transformer", True, lambda what, busy: told.append((what, busy)))
    with caplog.at_level(logging.DEBUG, "xdit_compile.progress"):
        shown.stage("capturing")
        shown.begin(3)
        shown.step(2)
        shown.step(1)
        shown.end()
        shown.end()
    assert told == [
        ("transformer: capturing", True), ("transformer: compiling graph 1 of 3", True),
        ("transformer: compiling graph 3 of 3", True), ("", False),
    ]  # fmt: skip
    phases = [vars(record)["phase"] for record in caplog.records]
    assert phases[1:] == [
        Phase("transformer: compiling graph 1 of 3", 3, 0),
        Phase("transformer: compiling graph 3 of 3", 3, 2),
        Phase(""),
    ]  # fmt: skip


def test_the_time_of_a_request_is_told_by_what_it_went_to(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    times = Times()
    now[0] += 1.0
    for first in (True, False):
        with times.calling():
            if first:
                now[0] += 3.0
                times.add("compiling", 3.0)
            now[0] += 2.0
    now[0] += 0.7
    times.add("capturing", 0.5)
    assert times.said(2) == "encoding 1.0 s, compiling 3.0 s, capturing 0.5 s, 2 steps 4.0 s, decoding 0.2 s"
    assert sum(map(float, re.findall(r"(\d+\.\d) s", times.said(2)))) == pytest.approx(8.7)
    times.begin()
    now[0] += 0.4
    assert times.said(None) == "0.4 s"
