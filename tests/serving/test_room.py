"""What requests take of the memory that is there, counted by real processes."""

from __future__ import annotations

import asyncio
import subprocess

import pytest
from commands import one_error, run

from xdit_compile.plan import Plan
from xdit_compile.serving.queue.messages import Work
from xdit_compile.serving.request import ServeRequest
from xdit_compile.serving.room import Free, Room


def test_small_requests_are_counted_by_nobody(monkeypatch: pytest.MonkeyPatch):
    room = Room(ServeRequest(height=64, width=64), Plan(), 1)
    for module, name in ((asyncio, "create_subprocess_exec"), (subprocess, "run")):
        monkeypatch.setattr(module, name, None)
    room.check()
    for work in (Work("a", "a"), Work("a", "a", height=72, width=64, guidance_scale=3.0)):
        assert asyncio.run(room.refusal(work)) is None


@pytest.mark.slow
def test_a_request_that_does_not_fit_is_told_by_how_much():
    room = Room(ServeRequest(), Plan(ulysses=2), 2, Free(4 << 30))

    async def asked() -> list[str | None]:
        sizes = [(4096, 4096), (8192, 8192), (8192, 8192)]
        works = [Work("a", "a", height=height, width=width) for height, width in sizes]
        return list(await asyncio.gather(*map(room.refusal, works)))

    small, large, again = asyncio.run(asked())
    assert large == again and large is not None and "4,096 MiB" in large and "decode" in large
    needed = int(large.split("about ")[1].split(" MiB")[0].replace(",", ""))
    assert needed > 4096
    assert len(room._known) == 2
    assert small is None or "4,096 MiB" in small


@pytest.mark.slow
def test_a_server_whose_pictures_do_not_fit_does_not_start(tmp_path):
    done = run("serve", "--port", "0", "--height", "100000", "--width", "100000", cwd=tmp_path)
    said = one_error(done, 2)
    assert "--height 100000 --width 100000 takes about" in said and "--force" in said
    assert "serving" not in done.stdout
