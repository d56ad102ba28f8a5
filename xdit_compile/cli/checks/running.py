"""Checks that run something: a C++ compiler, inductor on a small graph, two processes that join a group."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from xdit_compile.distributed.environment import defaults

from .finding import MISSING, OK, WARN, Finding, output_of

COMPILERS = ("g++", "c++", "clang++")
SOURCE = '#include <cmath>\n#include <cstdio>\nint main() { std::printf("%.1f", std::sqrt(4.0)); }\n'
COMPILER_LIMIT_S = 60.0
GRAPH_LIMIT_S = 240.0
GROUP_LIMIT_S = 120.0
RANKS = 2
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def compiler() -> Iterator[Finding]:
    """A C++ compiler, without which inductor compiles nothing for the CPU."""
    remedy = "install g++ (apt-get install g++), or take --backend eager"
    name = os.environ.get("CXX") or next(filter(shutil.which, COMPILERS), None)
    if name is None:
        yield Finding("C++", WARN, f"none of {', '.join(COMPILERS)} is there, so that inductor has none", remedy)
        return
    with tempfile.TemporaryDirectory(prefix="xdit-compile-doctor-") as folder:
        source, program = Path(folder, "small.cpp"), Path(folder, "small")
        source.write_text(SOURCE)
        begun = time.perf_counter()
        _, why_not = output_of([name, "-O1", str(source), "-o", str(program)], COMPILER_LIMIT_S)
        said, fails = ("", why_not) if why_not else output_of([str(program)], COMPILER_LIMIT_S)
    if fails or said != "2.0":
        yield Finding("C++", MISSING, f"{name} does not make a program that works: {fails or said}", remedy, True)
    else:
        seconds = time.perf_counter() - begun
        yield Finding("C++", OK, f"{shutil.which(name) or name}, a small program in {seconds:.1f} s")


def inductor() -> Iterator[Finding]:
    """Inductor on a small graph, in a process of its own and with a folder of its own."""
    from xdit_compile.backends.registry import backends

    why_not = backends()["inductor"].unavailable()
    if why_not is not None:
        return
    with tempfile.TemporaryDirectory(prefix="xdit-compile-doctor-") as folder:
        inside = {
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor", "TRITON_CACHE_DIR": f"{folder}/triton", "TMPDIR": folder,
        }  # fmt: skip
        said, why = _ended([sys.executable, "-P", "-m", f"{__package__}.small_graph"], GRAPH_LIMIT_S, inside)
    if why:
        remedy = "take --backend eager meanwhile, and --debug to see more"
        yield Finding("inductor", MISSING, f"compiles no small graph: {why}", remedy, True)
    else:
        yield Finding("inductor", OK, f"a small graph {said}")


def processes() -> Iterator[Finding]:
    """Two processes that join a group on this host, as --nproc starts them, and add up a number."""
    command = [
        sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1",
        "--nproc_per_node", str(RANKS), "-m", f"{__package__}.joining",
    ]  # fmt: skip
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", "PYTHONWARNINGS": "ignore"}
    with defaults(quiet):
        said, why = _ended(command, GROUP_LIMIT_S)
    if why:
        remedy = (
            "see that 127.0.0.1 can be reached and nothing blocks its ports, unset GLOO_SOCKET_IFNAME and "
            "NCCL_SOCKET_IFNAME, and look at memory above"
        )
        yield Finding("two processes", MISSING, f"do not join a group: {why}", remedy, True)
    else:
        yield Finding("two processes", OK, said)


def _ended(command: Sequence[str], limit_s: float, variables: dict[str, str] | None = None) -> tuple[str, str]:
    """The last line that a command prints, and why it failed; one of them is empty. Nothing of it is left running."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER} | (variables or {})
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    try:
        out, err = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return "", f"it did not end within {limit_s:g} s"
    finally:
        _end_all(process)
    if process.returncode:
        wrong = [line for line in err.strip().splitlines() if "Error" in line and "ChildFailed" not in line]
        lines = wrong or err.strip().splitlines() or out.strip().splitlines()
        return "", lines[-1].strip() if lines else f"exit code {process.returncode}"
    return (out.strip().splitlines() or [""])[-1], ""


def _end_all(process: subprocess.Popen[str]) -> None:
    """End a process and those that it started, which are in a session of their own."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
