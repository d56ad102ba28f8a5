"""A short suite under several releases of Python and PyTorch: ``make test-versions``.

Each pair gets an environment of its own, which is made where it is not there: PyTorch from ``TORCH_INDEX`` or pip's own
index, where it is a build for CUDA of some 5 GB, and the rest as `constraints.txt` pins it. What cannot be had is said,
and is no failure. The table goes to docs/versions.md, where the lines of other pairs stay.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS = ("3.11:2.11.0", "3.11:2.12.1", "3.11:2.13.0", "3.12:2.13.0", "3.13:2.13.0")
LEFT_OPEN = ("torch", "triton", "setuptools", "filelock", "diffusers")
"""What PyTorch's releases pin themselves, and diffusers, which is taken as new as there is."""
SUITE = (
    "tests/test_plan.py",
    "tests/backends/test_options.py",
    "tests/backends/test_recorded.py",
    "tests/kernels/test_ring.py",
    "tests/partition/test_partition.py",
)
PICTURE = "generate --nproc 2 --ulysses_degree 2 --num_inference_steps 2 --compare --device cpu"
READ = ("torch", "triton", "diffusers", "transformers", "numpy")
HEAD = ["Python", *READ, "suite", "date"]
SUITE_COLUMN = HEAD.index("suite")
BEGIN, END = "<!-- table -->", "<!-- end -->"


def main() -> int:
    """Run what is asked for, and return 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", nargs="*", default=PAIRS, help="PYTHON:TORCH, such as 3.12:2.13.0")
    parser.add_argument("--folder", type=Path, default=ROOT / ".versions", help="where environments are made")
    parser.add_argument("--write", type=Path, help="a page whose table is written anew")
    given = parser.parse_args()
    wrong = [pair for pair in given.pairs if not re.fullmatch(r"\d+\.\d+:\d+\.\d+\.\d+", pair)]
    if wrong:
        parser.error(f"{', '.join(wrong)}: a pair is PYTHON:TORCH, such as 3.12:2.13.0")
    rows = []
    for pair in given.pairs:
        python, _, torch = pair.partition(":")
        print(f"{pair} ...", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        rows.append(row_of(python, torch, given.folder.absolute()))
        print(" | ".join(rows[-1]), f"({time.perf_counter() - begun:.0f} s)", flush=True)
        if given.write is not None:
            written(given.write, rows)
    return int(any(re.search(r"^(?!not tried).*(failed|\d error)", row[SUITE_COLUMN]) for row in rows))


def row_of(python: str, torch: str, folder: Path) -> list[str]:
    """One line of the table: versions, and what came of the suite."""
    home = folder / f"{python}-torch{torch}"
    if (why_not := made(python, torch, home)) != "":
        return [python, torch, "", "", "", "", f"not tried: {why_not}", today()]
    read = versions(home / "bin" / "python")
    facts = [read["python"], *(read[name] for name in READ)]
    tests = run([home / "bin" / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *SUITE])
    counted = re.findall(r"\d+ (?:passed|failed|errors?|skipped)", (tests.stdout.strip().splitlines() or [""])[-1])
    said = ", ".join(counted) or f"failed: {last_line(tests)}"
    with tempfile.TemporaryDirectory() as elsewhere:
        picture = run(
            [home / "bin" / "python", "-P", "-m", "xdit_compile", *PICTURE.split(), "--output", f"{elsewhere}/a.png"]
        )
    off = re.search(r"\(([\d.e+-]+) of its greatest value", picture.stdout + picture.stderr)
    said += f"; picture {off[1]} off" if picture.returncode == 0 and off else f"; picture failed: {last_line(picture)}"
    return [*facts, said, today()]


def made(python: str, torch: str, home: Path) -> str:
    """Make an environment unless it is there; why it cannot be had, empty where it can."""
    if not (home / "bin" / "python").exists():
        interpreter = interpreter_of(python)
        if interpreter is None:
            return f"there is no Python {python} here"
        run([interpreter, "-m", "venv", home])
    pip = [home / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    if torch != versions(home / "bin" / "python")["torch"].partition("+")[0]:
        index = ["--index-url", os.environ["TORCH_INDEX"]] if os.environ.get("TORCH_INDEX") else []
        if (done := run([*pip, f"torch=={torch}", *index], 3600)).returncode:
            shutil.rmtree(home)
            return last_line(done)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as pins:
        lines = (ROOT / "constraints.txt").read_text().splitlines()
        pins.write("\n".join(line for line in lines if line.partition("==")[0] not in LEFT_OPEN) + "\n")
        pins.flush()
        done = run([*pip, "-c", pins.name, "-e", f"{ROOT}[test]"], 3600)
        return last_line(done) if done.returncode else ""


def interpreter_of(python: str) -> str | None:
    """A Python of some minor release: of the path, or of pyenv."""
    roots = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions").glob(f"{python}.*/bin/python")
    for each in (shutil.which(f"python{python}"), *map(str, roots)):
        if (
            each
            and run(
                [each, "-c", f"import sys; sys.exit(sys.version_info[:2] != ({python.replace('.', ', ')}))"]
            ).returncode
            == 0
        ):
            return each
    return None


def versions(python: Path) -> dict[str, str]:
    """The versions that an environment has; empty text for what is not there."""
    code = (
        "import json, platform, importlib.metadata as m\n"
        f"read = lambda name: m.version(name) if list(m.distributions(name=name)) else ''\n"
        f"print(json.dumps({{'python': platform.python_version(), **{{name: read(name) for name in {READ!r}}}}}))"
    )
    return json.loads(run([python, "-c", code]).stdout)


def run(command: list[object], limit_s: float = 1200) -> subprocess.CompletedProcess[str]:
    """One command in the repository, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDIT_COMPILE_CACHE": "off"}
    try:
        return subprocess.run(
            list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"it did not end within {limit_s:g} s")


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """The last line of what a command said."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1].strip() if lines else f"exit code {done.returncode}"


def written(page: Path, rows: list[list[str]]) -> None:
    """Put rows into the table that a page has between two marks, in the place of those of the same pairs."""
    before, _, rest = page.read_text().partition(BEGIN)
    table, _, after = rest.partition(END)
    there = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    kept = {pair_of(row): row for row in [*there, *rows]}
    lines = [HEAD, ["---"] * len(HEAD), *(kept[pair] for pair in sorted(kept))]
    page.write_text("\n".join([before + BEGIN, *("| " + " | ".join(cells) + " |" for cells in lines), END + after]))


def pair_of(row: list[str]) -> tuple[tuple[int, ...], ...]:
    """The minor release of Python and the release of PyTorch that a row of the table is about."""
    python, torch = ([int(number) for number in re.findall(r"\d+", cell)] for cell in row[:2])
    return tuple(python[:2]), tuple(torch[:3])


def today() -> str:
    """The date, as the table has it."""
    return str(datetime.date.today())


if __name__ == "__main__":
    sys.exit(main())
