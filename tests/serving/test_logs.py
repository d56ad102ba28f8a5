"""What a server says on stderr: how much, and in which form."""

from __future__ import annotations

import json
import logging

import pytest

from xdit_compile.cli.processes.speech import as_found
from xdit_compile.distributed.world import World
from xdit_compile.errors import UsageError
from xdit_compile.plan.log_level import VARIABLE
from xdit_compile.serving.http import guard
from xdit_compile.serving.logs import show_logs
from xdit_compile.serving.queue.starters import how_it_ended
from xdit_compile.serving.request import ServeRequest


def said(capsys: pytest.CaptureFixture[str], world: World | None = None, **flags: object) -> list[str]:
    with as_found():
        show_logs(ServeRequest(**flags), world)
        guard.log.info("GET / 200", extra={"request_id": "mine", "status": 200})
        guard.log.warning("two\nlines")
    return capsys.readouterr().err.splitlines()


def test_json_is_an_object_a_line_with_the_requests_id(capsys: pytest.CaptureFixture[str]):
    first, second = map(json.loads, said(capsys, log_format="json"))
    assert (first["request_id"], first["status"], first["levelname"]) == ("mine", 200, "INFO")
    assert first["message"] == "GET / 200" and first["name"] == guard.log.name
    assert second["message"] == "two\nlines"
    (of_rank,) = map(json.loads, said(capsys, World(rank=0, size=2, local_rank=0, launched=True), log_format="json"))
    assert (of_rank["rank"], of_rank["levelname"]) == (0, "WARNING")


def test_the_variable_counts_where_no_flag_says_how_much(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert "INFO" in said(capsys)[0]
    assert "WARNING" in said(capsys, quiet=True)[0]
    monkeypatch.setenv(VARIABLE, "warning")
    assert "WARNING" in said(capsys)[0]
    assert "INFO" in said(capsys, verbose=True)[0]
    monkeypatch.setenv(VARIABLE, "error")
    assert said(capsys) == []
    monkeypatch.setenv(VARIABLE, "loud")
    with pytest.raises(UsageError, match="loud is no level"):
        said(capsys)
    assert not logging.getLogger("uvicorn").propagate


def test_a_rank_that_was_killed_is_told_with_what_to_do():
    assert how_it_ended(-9).startswith("was killed by SIGKILL; see that there is memory enough")
    assert how_it_ended(3) == "ended with exit code 3"
