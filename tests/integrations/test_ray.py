"""Gangs of ranks on real clusters of Ray: a script's own, and a service whose actors, gangs and nodes are lost."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from diffusers import DiffusionPipeline
from ray import serve

from benchmarks.serving_client import alone, processes
from xdit_compile.cli.options.request import DEMO_PIPELINE
from xdit_compile.errors import UsageError, XditCompileError
from xdit_compile.integrations.ray import Ranks, build, needed, placing
from xdit_compile.integrations.ray.app import Replicas, application
from xdit_compile.plan import Plan
from xdit_compile.serving.queue.starters import free_port
from xdit_compile.serving.request import ServeRequest

from .ray_cluster import Service, cluster_of, serving_on

ROOT = Path(__file__).resolve().parents[2]
ASKED = {"prompt": "a red circle", "num_inference_steps": 12, "seed": 3}
GONE_S = 20.0
PLAN = Plan(ulysses=2, backend="eager")


def load() -> Any:
    return DiffusionPipeline.from_pretrained(str(DEMO_PIPELINE))


def make(pipe: Any, **others: Any) -> np.ndarray:
    generator = torch.Generator().manual_seed(5)
    return pipe(prompt="a red circle", num_inference_steps=3, generator=generator, output_type="np", **others).images


class Awkward(Exception):
    """One that cannot be copied."""

    def __init__(self, one: int, two: int):
        super().__init__(f"{one} {two}")


def _raise_awkwardly() -> None:
    raise Awkward(1, 2)


def _fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("only here")


def until(holds: Callable[[], bool], seconds: float = GONE_S) -> None:
    limit = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.1)


def state(server: Service) -> dict[str, Any]:
    return json.loads(server.get("/v1/status")[1])


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"plan": {"ulyses": 2}}, "plan has no ulyses; did you mean ulysses?"),
        ({"max_bach": 2}, "args has no max_bach; did you mean max_batch?"),
        ({"replicas": "4:1"}, "--replicas 4:1: give a number of gangs"),
        ({"rank_resources": "GPU"}, "--rank_resources GPU: 'GPU' is no amount"),
        ({"max_batch": 0}, "--max_batch 0 must be at least 1"),
    ],
)
def test_an_application_says_what_is_wrong_with_it(args: dict[str, Any], said: str):
    with pytest.raises(UsageError, match=said.replace("?", r"\?")):
        build(args)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        (None, "Ray is not installed; run: pip install"),
        ("2.9.3", "Ray 2.9.3 is too old, 2.60 or newer is needed; run:"),
    ],
)
def test_a_missing_or_old_ray_is_told(version: str | None, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(needed, "version_of", lambda name: version)
    with pytest.raises(UsageError, match=re.escape(said)):
        needed.check_ray()


def test_a_share_fits_as_often_as_the_scarcest_of_it():
    share = placing.Share.parsed("GPU=1, CPU=4")
    assert share.options == {"num_cpus": 4.0, "num_gpus": 1.0, "resources": {}}
    assert share.times({"CPU": 11.0, "GPU": 8.0}) == 2
    assert share.times({"CPU": 11.0}) == 0


@pytest.mark.slow
def test_ranks_of_a_script_are_actors_over_two_nodes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(placing, "BUSY_S", 2.0)
    want = make(load())
    with cluster_of(1, 1) as (cluster, _):
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            with Ranks(PLAN) as ranks:
                assert len(set(ranks.run(lambda: ray.get_runtime_context().get_node_id()))) == 2
                assert ranks.run(lambda: os.environ["LOCAL_RANK"]) == ["0", "0"]
                pipe = ranks.pipeline(load)
                for _ in range(2):
                    assert np.abs(make(pipe) - want).max() <= 2e-5
                with pytest.raises(ValueError, match="height"):
                    make(pipe, height=17, use_resolution_binning=False)
                assert np.abs(make(pipe) - want).max() <= 2e-5
                begin = time.monotonic()
                with pytest.raises(UsageError, match="no room for 4 ranks of 1 CPU: it has 2 CPU"):
                    Ranks(Plan(ulysses=4))
                with pytest.raises(UsageError, match="had no room for 2 ranks of 1 CPU within 2 s: nothing of 2 CPU"):
                    Ranks(PLAN)
                assert time.monotonic() - begin < GONE_S
                with pytest.raises(TypeError, match="a generator cannot be sent from an actor"):
                    ranks.run(lambda: (number for number in range(2)))
                with pytest.raises(XditCompileError, match="^Awkward: 1 2$"):
                    ranks.run(_raise_awkwardly)
                os.kill(ranks.run(os.getpid)[1], signal.SIGKILL)
                with pytest.raises(XditCompileError, match="rank 1: its actor died; all ranks were ended"):
                    make(pipe)
                with pytest.raises(UsageError, match="these ranks have ended"):
                    make(pipe)
                with Ranks(PLAN) as others:
                    assert others.run(lambda: os.environ["RANK"]) == ["0", "1"]
                    with pytest.raises(XditCompileError, match="rank 1: only here; all ranks were ended"):
                        others.run(_fail_on_rank_1)
        finally:
            ray.shutdown()


@pytest.mark.slow
def test_the_script_of_the_page_runs_on_a_cluster_that_it_starts(tmp_path: Path):
    text = (ROOT / "docs" / "ray.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (tmp_path / "script.py").write_text(block.replace("FOLDER_OR_ID", str(DEMO_PIPELINE)))
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["0.png", "1.png"]


@pytest.mark.slow
def test_actors_end_with_the_script_that_made_them(tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import time\nfrom xdit_compile.plan import Plan\nfrom xdit_compile.integrations.ray import Ranks\n"
        "if __name__ == '__main__':\n    with Ranks(Plan(ulysses=2)) as ranks:\n        print('there', flush=True)\n"
        "        ranks.run(time.sleep, 600)\n"
    )
    with cluster_of(2) as (cluster, _):
        running = subprocess.Popen(
            [sys.executable, script], env={**os.environ, "RAY_ADDRESS": cluster.address}, stdout=subprocess.PIPE
        )
        assert running.stdout is not None and running.stdout.readline() == b"there\n"
        until(lambda: len(processes("ray::RankActor")) == 2)
        running.kill()
        running.wait()
        until(lambda: not processes("ray::RankActor"))


@pytest.mark.slow
def test_a_service_goes_on_where_an_actor_a_gang_or_a_node_is_lost(tmp_path: Path):
    want = alone([dict(ASKED)])[0]
    with cluster_of(2, 2) as (cluster, nodes):
        with serving_on(cluster.address, tmp_path, "--retry", "--replicas", "2") as server:
            assert state(server)["gangs"] == 2
            _all_right(server, want, lambda: None, count=4)
            _all_right(server, want, lambda: processes("ray::RankActor")[0].kill())
            _all_right(server, want, lambda: [each.kill() for each in processes("ray::RankActor")])
            _all_right(server, want, lambda: processes("ray::ServeReplica:xdit-compile:Gang")[0].kill())
            until(lambda: state(server)["gangs"] == 2, 60)
            assert state(server)["restarts"] >= 2
            _all_right(server, want, lambda: cluster.remove_node(nodes[0], allow_graceful=False), count=3)
            asking = threading.Thread(target=lambda: server.ask(**{**ASKED, "num_inference_steps": 500}, id="long"))
            asking.start()
            until(lambda: any(each["step"] for each in state(server)["running"]))
            assert server.cancel("long") == 200
            asking.join(GONE_S)
            assert state(server)["running"] == []
            kinds = [event["type"].partition(".")[2] for event in server.events(**ASKED)]
            assert kinds == ["queued", "started", *["progress"] * 12, "completed"]
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait(GONE_S) == 0
        assert not processes("ray::RankActor")
        assert "Traceback" not in (tmp_path / "log").read_text().rpartition("xdit_compile.serving.http.guard")[2]


@pytest.mark.slow
def test_another_gang_takes_what_was_at_work_on_ranks_that_have_no_room_left(tmp_path: Path):
    want = alone([dict(ASKED)])[0]
    with contextlib.ExitStack() as held:
        cluster, nodes = held.enter_context(cluster_of(1, 1, 1, 1))
        server = held.enter_context(serving_on(cluster.address, tmp_path, "--retry", "--replicas", "2"))
        ray.init(address=cluster.address, log_to_driver=False)
        held.callback(ray.shutdown)
        groups = ray.util.placement_group_table().values()
        lost = next(group["bundles_to_node_id"][1] for group in groups if group["state"] == "CREATED")
        node = next(node for node in nodes if node.node_id == lost)
        _all_right(server, want, lambda: cluster.remove_node(node, allow_graceful=False), count=3)


@pytest.mark.slow
def test_a_gang_gives_up_what_a_lost_front_wanted(tmp_path: Path):
    long = {**ASKED, "num_inference_steps": 1000}
    with cluster_of(2) as (cluster, _), serving_on(cluster.address, tmp_path, "--max_batch", "1") as server:

        def ask() -> None:
            with contextlib.suppress(json.JSONDecodeError):  # what Serve's proxy says then is its own
                server.ask(**long)

        asking = threading.Thread(target=ask)
        asking.start()
        until(lambda: any(each["step"] for each in state(server)["running"]))
        processes("ray::ServeReplica:xdit-compile:Front")[0].kill()
        asking.join()
        until(lambda: server.get("/health")[0] == 200, 60)
        assert server.ask(**ASKED).status == 200
        (turns,) = re.findall(r"^xdit_batch_size_count (\S+)", server.get("/metrics")[1], re.MULTILINE)
        assert ASKED["num_inference_steps"] <= float(turns) < 500


@pytest.mark.slow
def test_a_gang_that_is_one_too_many_ends_what_it_is_at():
    request = ServeRequest(plan=PLAN, max_batch=1)
    with cluster_of(4) as (cluster, _):
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            serve.start(http_options={"port": (port := free_port())}, proxy_location="HeadOnly")
            serve.run(application(request, Replicas(1, 2, up_s=1, down_s=3), placing.Share({"CPU": 1})), name="few")
            server, answers = Service(None, f"http://127.0.0.1:{port}"), {}

            def ask(name: str, steps: int) -> threading.Thread:
                def run() -> None:
                    answers[name] = server.ask(**{**ASKED, "num_inference_steps": steps}, id=name).status

                asking = threading.Thread(target=run)
                asking.start()
                return asking

            first = ask("first", 600)
            until(lambda: any(each["step"] for each in state(server)["running"]))
            last = ask("last", 700)
            until(lambda: len(state(server)["running"]) == 2, 60)
            server.cancel("first")
            first.join()
            last.join()
            assert answers["last"] == 200
            until(lambda: state(server)["gangs"] == 1, 60)
        finally:
            serve.shutdown()
            ray.shutdown()


def _all_right(server: Service, want: np.ndarray, disturb: Callable[[], Any], count: int = 2) -> None:
    """Requests at once, in the midst of which something happens, all give the picture."""
    answers: list[Any] = []
    asking = [threading.Thread(target=lambda: answers.append(server.ask(**ASKED))) for _ in range(count)]
    for each in asking:
        each.start()
    time.sleep(1.0)
    disturb()
    for each in asking:
        each.join()
    assert [answer.status for answer in answers] == [200] * count, [answer.body.get("error") for answer in answers]
    assert max(np.abs(answer.picture - want).max() for answer in answers) <= 1


@pytest.mark.slow
def test_gangs_follow_the_queue_and_end_with_a_killed_command(tmp_path: Path):
    with contextlib.ExitStack() as held:
        cluster, _ = held.enter_context(cluster_of(2, 2))
        server = held.enter_context(serving_on(cluster.address, tmp_path, "--replicas", "1:2", "--max_batch", "1"))
        again = [sys.executable, "-m", "xdit_compile", "serve", "--ray", cluster.address, "--ulysses_degree", "2"]
        done = subprocess.run(again, capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert "the cluster has an application xdit-compile already" in done.stderr
        answers: list[Any] = []
        wanted = {**ASKED, "num_inference_steps": 40}
        asking = [threading.Thread(target=lambda: answers.append(server.ask(**wanted))) for _ in range(8)]
        for each in asking:
            each.start()
        until(lambda: state(server)["gangs"] == 2, 60)
        for each in asking:
            each.join()
        assert [answer.status for answer in answers] == [200] * 8
        server.process.kill()
        until(lambda: not processes("ray::RankActor") and not processes("ray::ServeReplica"))


@pytest.mark.slow
def test_a_signal_before_there_is_a_service_is_heeded():
    command = [
        sys.executable,
        "-m",
        "xdit_compile",
        "serve",
        "--port",
        "0",
        "--ulysses_degree",
        "2",
        "--backend",
        "eager",
    ]
    for more, wait_s in ((["--ray", "--ulysses_degree", "64", "--wait_for_nodes", "200"], 10), (["--ray"], 7)):
        running = subprocess.Popen([*command, *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(wait_s)
        running.send_signal(signal.SIGINT)
        out, errors = running.communicate(timeout=GONE_S)
        assert (running.returncode, out) == (130, ""), errors
        assert errors.strip().endswith("interrupted")
    assert not processes("ray::RankActor")


@pytest.mark.slow
def test_an_application_is_deployed_as_others_are():
    with cluster_of(2) as (cluster, _):
        ray.init(address=cluster.address, log_to_driver=False)
        try:
            serve.start(http_options={"port": (port := free_port())}, proxy_location="HeadOnly")
            serve.run(build({"plan": {"ulysses": 2, "backend": "eager"}, "replicas": 1}), name="pictures")
            answer = Service(None, f"http://127.0.0.1:{port}").ask(**ASKED)
            assert answer.status == 200
            assert np.abs(answer.picture - alone([dict(ASKED)])[0]).max() <= 1
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models") as said:
                assert len(said.headers.get_all("X-Request-Id")) == 1
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--replicas", "2"], "--replicas says how a cluster of Ray is used; give --ray, too"),
        (["--ray", "nowhere"], "nowhere is no address of a cluster; give HOST:PORT, as ray start says it"),
        (["--ray", "127.0.0.1:1"], "there is no cluster of Ray at 127.0.0.1:1: [Errno 111] Connection refused"),
        (["--ray", "--plan", "latency=ulysses:2"], "--plan changes plans on one machine; with --ray"),
    ],
)
def test_the_command_says_what_is_wrong_with_a_cluster(flags: list[str], said: str):
    done = subprocess.run(
        [sys.executable, "-m", "xdit_compile", "serve", *flags], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert said in done.stderr
