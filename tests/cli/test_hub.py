"""Models of the Hub by the real command, from a server on this machine that answers as the Hub does."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import TINY_PIPELINE, files, one_error, run


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as one model takes, which is TINY_PIPELINE; ``asked`` has the paths that were asked for."""

    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self.wfile.write(self._answer())

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def _answer(self) -> bytes:
        path = self.path.partition("?")[0]
        self.asked.append(path)
        names = [str(file.relative_to(TINY_PIPELINE)) for file in TINY_PIPELINE.rglob("*") if file.is_file()]
        name = path.partition("/resolve/")[2].partition("/")[2]
        if path.startswith("/api/models/some/model/tree/"):
            files = [{"type": "file", "path": each, "size": 1, "oid": "1" * 40} for each in names]
            answer = json.dumps(files).encode()
        elif path.startswith("/api/models/some/model"):
            siblings = [{"rfilename": each} for each in names]
            answer = json.dumps({"id": "some/model", "sha": "0" * 40, "siblings": siblings}).encode()
        elif path.startswith("/some/model/resolve/") and name in names:
            answer = (TINY_PIPELINE / name).read_bytes()
        else:
            answer = b""
        self.send_response(200 if answer else 404)
        for header, value in {"ETag": f'"{hashlib.sha1(answer).hexdigest()}"', "X-Repo-Commit": "0" * 40}.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        return answer


@pytest.fixture
def hub() -> Iterator[tuple[str, list[str]]]:
    """The address of a Hub with ``some/model``, and the paths that are asked for there."""
    asked: list[str] = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("OneHub", (Hub,), {"asked": asked})) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_what_a_model_of_the_hub_cannot_is_refused_before_its_weights_are_fetched(
    tmp_path: Path, hub: tuple[str, list[str]]
):
    (tmp_path / "here").mkdir()
    address, asked = hub
    refused = {
        "generate --height 500 --nproc 2 --ulysses_degree 2": "--height 500 is no multiple of 16, as this model needs",
        "generate --output a.mp4": "--output a.mp4: this pipeline makes images; end it in one of .png",
        "build --size 512x500 --cache_dir ../kept": "--width 500 is no multiple of 16",
    }
    for arguments, expected in refused.items():
        done = run(
            *arguments.split(), "--model", "some/model", cwd=tmp_path / "here", HF_ENDPOINT=address,
            HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="0",
        )  # fmt: skip
        assert expected in one_error(done, exit_code=2)
    fetched = {path.partition("/resolve/")[2].partition("/")[2] for path in asked if "/resolve/" in path}
    assert {"model_index.json", "vae/config.json", "transformer/config.json"} <= fetched
    assert all(name == "model_index.json" or name.endswith("/config.json") for name in fetched)
    done = run(
        "generate", "--model", "some/other", cwd=tmp_path / "here", HF_ENDPOINT=address, HF_HOME=str(tmp_path / "hub")
    )
    assert "--model some/other cannot be fetched: " in one_error(done, exit_code=1)
    assert files(tmp_path / "here") == set()


@pytest.mark.slow
def test_a_model_of_the_hub_draws_and_does_so_again_without_a_network(tmp_path: Path, hub: tuple[str, list[str]]):
    address, asked = hub
    small = "--model some/model --backend eager --height 64 --width 64 --num_inference_steps 1 --no_cache".split()
    place = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "hub")}
    done = run("generate", *small, cwd=tmp_path, **place)
    assert done.returncode == 0 and "Fetching 6 files" not in done.stderr, done.stderr
    first, asked[:] = (tmp_path / "out.png").read_bytes(), []
    done = run("generate", *small, "--overwrite", cwd=tmp_path, **place, HF_HUB_OFFLINE="1")
    assert done.returncode == 0 and (tmp_path / "out.png").read_bytes() == first, done.stderr
    assert asked == []
