"""What the pages show is true: Python runs, excerpts stand in the source, commands parse, the worked example's dump is
what comes out.

A Python block runs, page by page from top to bottom. ``path`` and ``pipe`` are the embedded pipeline, `parallelize`
works on one rank here, and the plan it was given is partitioned on paper for all its ranks; the slow test runs the same
blocks on as many processes. In ``docs/how-to`` a block without imports is an excerpt and stands in a source file.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib
import inspect
import io
import os
import re
import shlex
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np
import procs
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import fx
from torch.distributed.run import get_args_parser

import xdit_compile
from xdit_compile import Plan, api
from xdit_compile.api import loading
from xdit_compile.cli.main import cli
from xdit_compile.cli.options.request import DEMO_PIPELINE, Request, plan_from_flags
from xdit_compile.cli.running.explain import denoiser_call
from xdit_compile.compiler import Analysis, analyse, place
from xdit_compile.distributed.mesh import Mesh
from xdit_compile.ir.verify_program import verify_program
from xdit_compile.passes.choose.units import choose_units
from xdit_compile.plan.methods import METHODS
from xdit_compile.reports.pipeline_report import pipeline_report
from xdit_compile.serving.queue.arrangements import arrangements_of

ROOT = Path(__file__).resolve().parents[1]
README, EXAMPLE, EXCERPTS = "README.md", "docs/worked-example.md", "docs/how-to/"
FOLDERS = ("benchmarks", "backends", "examples", "kernels", "passes", "tests", "xdit_compile")
OWN_SCRIPTS = {"script.py"}
"""What a reader brings."""
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`]+)`(?!`)")
FLAG = re.compile(r"--[a-z][\w-]*")
COMMANDS = ("xdit-compile", "make", "python", "torchrun", "pip", "sh")


@dataclasses.dataclass(frozen=True)
class Block:
    """What stands between two fences, and in which line of its page it begins."""

    page: str
    line: int
    language: str
    text: str


def _pages() -> list[str]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    found += [*(ROOT / "benchmarks").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


@functools.cache
def read(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in some languages."""
    found = []
    for match in FENCE.finditer(read(page)):
        if match[2] in languages:
            line = read(page).count("\n", 0, match.start()) + 2
            found.append(Block(page, line, match[2], textwrap.dedent(match[3])))
    return found


def spans(page: str) -> list[str]:
    """Code within the text of a page, each on one line, and the flags in comments of Python blocks."""
    found = [" ".join(text.split()) for text in INLINE.findall(FENCE.sub("", read(page)))]
    return found + [flag for block in blocks(page, "python") for flag in re.findall(r"(?<=[ #])--.*", block.text)]


def is_excerpt(block: Block) -> bool:
    return block.page.startswith(EXCERPTS) and not re.search(r"^(import|from) ", block.text, re.MULTILINE)


PAGES = _pages()
ELSEWHERE = ("docs/serving.md", "docs/ray.md")
"""Their snippets need a server or a cluster: tests/serving/test_serve.py, tests/integrations/test_ray.py run them."""
RUNNING = [
    page for page in PAGES if page not in ELSEWHERE and any(not is_excerpt(block) for block in blocks(page, "python"))
]


# ---------------------------------------------------------------------------------------------- blocks that run


@functools.cache
def unsplit() -> Analysis:
    """A call of the embedded pipeline's denoiser, on the meta device."""
    call = denoiser_call(Request())
    return analyse(call.module, Plan(), call.args, call.kwargs)


def partition_on_paper(plan: Plan) -> None:
    """Make what ranks of a plan would run of that call: all stages of a pipeline, else the first and the last rank.

    Raises:
        PlanError, PartitionError: the plan cannot run.
    """
    plan.check(plan.world_size)
    analysis = dataclasses.replace(unsplit(), units=choose_units(unsplit().inference, plan))
    if plan.patch_count > 1:
        pipeline_report(analysis, plan)
        return
    for rank in {0, plan.world_size - 1}:
        program = place(analysis, plan, Mesh.simulated(plan, rank), stale=plan.distrifusion > 1).program
        verify_program(program, f"rank {rank} of {plan}", metadata=False)


def alone(plan: Plan) -> Plan:
    """The same choices on one rank."""
    degrees: dict[str, Any] = {method.name: 1 for method in METHODS}
    return dataclasses.replace(plan, **degrees, stage_layers=None, vae_degree=None, backend="eager")


def load() -> Any:
    pipe = DiffusionPipeline.from_pretrained(str(DEMO_PIPELINE))
    pipe.set_progress_bar_config(disable=True)
    return pipe


READERS: dict[str, Callable[[], Any]] = {"path": lambda: str(DEMO_PIPELINE), "pipe": load}
"""What a reader has before a block."""


def imports_of(page: str) -> list[ast.stmt]:
    """What a page imports anywhere."""
    statements = [each for block in blocks(page, "python") for each in ast.parse(block.text).body]
    return [each for each in statements if isinstance(each, ast.Import | ast.ImportFrom)]


def namespace_for(page: str) -> dict[str, Any]:
    """A page that imports nothing goes on from the README."""
    found: dict[str, Any] = {"__name__": "snippet"}
    if not page.startswith(EXCERPTS) and not imports_of(page):
        found |= {"torch": torch, "xdit_compile": xdit_compile}
        exec(compile(ast.Module(imports_of(README), []), README, "exec"), found)
    return found


def execute(block: Block, namespace: dict[str, Any]) -> None:
    """Run a block; tracebacks name the line of the page."""
    tree = ast.increment_lineno(ast.parse(block.text, block.page), block.line - 1)
    read_names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    namespace |= {name: make() for name, make in READERS.items() if name in read_names}
    exec(compile(tree, block.page, "exec"), namespace)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """The plans that pipelines were given, which all run on one rank."""
    given: list[Plan] = []
    attach = api.attach

    def attach_alone(target: Any, plan: Plan, weights: Any) -> Any:
        given.append(plan)
        return attach(target, alone(plan), weights)

    monkeypatch.setattr(api, "attach", attach_alone)
    monkeypatch.setattr(loading, "attach", attach_alone)
    return given


def run_page(page: str) -> tuple[dict[str, Any], str]:
    """What a page leaves in its namespace, and what it prints."""
    namespace, printed = namespace_for(page), io.StringIO()
    with contextlib.redirect_stdout(printed):
        for block in blocks(page, "python"):
            if not is_excerpt(block):
                execute(block, namespace)
    return namespace, printed.getvalue()


@pytest.mark.parametrize("page", [page for page in RUNNING if page != EXAMPLE])
def test_python_runs(page: str, plans: list[Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)
    for plan in dict.fromkeys(plans):
        partition_on_paper(plan)


def parallel_blocks() -> list[Block]:
    found = [block for page in RUNNING for block in blocks(page, "python")]
    return [block for block in found if re.search(r"\b(parallelize|from_pretrained)\(.*Plan\(", block.text)]


@pytest.mark.slow
@pytest.mark.parametrize("block", parallel_blocks(), ids=lambda block: f"{block.page}:{block.line}")
def test_python_runs_on_several_processes(block: Block, tmp_path: Path):
    ranks = max(plan.world_size for plan in written_plans(block.text))
    pictures = procs.run(_on_a_rank, ranks, block, tmp_path, timeout=400)
    assert all(np.array_equal(picture, pictures[0]) for picture in pictures)


def _on_a_rank(rank: int, block: Block, folder: Path) -> Any:
    os.chdir(folder)
    attach, namespace = api.attach, namespace_for(block.page)
    steps = 1 + max(plan.warmup_steps for plan in written_plans(block.text))

    def attach_eagerly(target: Any, plan: Plan, weights: Any) -> Any:
        return attach(target, dataclasses.replace(plan, backend="eager"), weights)

    api.attach = loading.attach = attach_eagerly
    execute(block, namespace)
    return np.asarray(namespace["pipe"]("a small green square", num_inference_steps=steps).images[0])


# ---------------------------------------------------------------------------------------------- excerpts


@functools.cache
def sources() -> dict[Path, str]:
    """Every Python file of the repository, blanks and line ends made single blanks."""
    paths = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")} - {Path(__file__)}
    return {path: f" {' '.join(path.read_text().split())} " for path in paths}


def stands_in(text: str, source: str) -> bool:
    """Whether the parts of an excerpt between lines of ``...`` follow one another in a source."""
    at = 0
    for part in re.split(r"^\s*\.\.\.\s*$", text, flags=re.MULTILINE):
        at = source.find(f" {' '.join(part.split())} ", at)
        if at < 0:
            return False
    return True


@pytest.mark.parametrize("page", [page for page in PAGES if any(map(is_excerpt, blocks(page, "python")))])
def test_excerpts_stand_in_the_source(page: str):
    lost = [
        f"{page}:{block.line}"
        for block in filter(is_excerpt, blocks(page, "python"))
        if not any(stands_in(block.text, source) for source in sources().values())
    ]
    assert not lost


# ---------------------------------------------------------------------------------------------- commands


def check_line(line: str) -> None:
    """Look at one command line.

    Raises:
        ValueError, click.ClickException, PlanError: it cannot run; says why.
    """
    words = shlex.split(line, comments=True)
    start = next((at for at, word in enumerate(words) if Path(word).name in COMMANDS), None)
    if start is None:
        return
    name, arguments = Path(words[start]).name, [word for word in words[start + 1 :] if word not in ("...", "…")]
    {
        "xdit-compile": check_own,
        "make": check_make,
        "python": check_python,
        "torchrun": check_torchrun,
        "pip": check_pip,
        "sh": lambda given: check_line(given[given.index("-c") + 1]),
    }[name](arguments)


def check_own(arguments: Sequence[str]) -> None:
    """Parse the flags of ``xdit-compile``; the plan that they make goes with the processes that they start."""
    group = cli.make_context("xdit-compile", list(arguments))
    name, command, rest = cli.resolve_command(group, list(arguments))
    assert command is not None
    given = command.make_context(name, [word for word in rest if word != "--print_config"], parent=group).params
    if "ulysses_degree" in given:
        for each in arrangements_of(plan_from_flags(**given), given.get("plans", ())):
            each.plan.check(given["nproc"] // each.gangs if given.get("nproc") else None)


def check_make(arguments: Sequence[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        variable = re.match(r"(\w+)=", word)
        pattern = rf"\$[({{](or \$\()?{variable[1]}\b" if variable else rf"^{re.escape(word)}:"
        if not re.search(pattern, makefile, re.MULTILINE):
            raise ValueError(f"the Makefile has no {word}")


def check_python(arguments: Sequence[str]) -> None:
    """The script or module is there, and it has the flags; of pytest, the files are."""
    if arguments[0] == "-m":
        module, rest = arguments[1], arguments[2:]
        if module == "pytest":
            _exist(word.split("::")[0] for word in rest if "/" in word)
            return
        found = importlib.util.find_spec(module)
        if found is None or found.origin is None:
            raise ValueError(f"there is no module {module}")
        package = Path(found.origin)
        text = "".join(path.read_text() for path in package.parent.glob("*.py"))
    else:
        script, rest = arguments[0], arguments[1:]
        if script in OWN_SCRIPTS:
            return
        _exist([script])
        text = "".join(path.read_text() for path in (ROOT / script).parent.glob("*.py"))
    for word in rest:
        flag = FLAG.match(word)
        if flag and f'"{flag[0]}"' not in text and flag[0] != "--help":
            raise ValueError(f"{arguments} has a flag {flag[0]} that is not there")


def check_torchrun(arguments: Sequence[str]) -> None:
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            given = get_args_parser().parse_args(list(arguments))
        except SystemExit:
            raise ValueError(said.getvalue()) from None
    if given.training_script not in OWN_SCRIPTS:
        _exist([given.training_script])


def check_pip(arguments: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in arguments:
        for extra in re.findall(r"^(?:xdit-compile|\.)?\[([\w-]+)\]$", word):
            if extra not in extras:
                raise ValueError(f"there is no extra {extra}")


def _exist(paths: Any) -> None:
    for path in paths:
        if not (ROOT / path).exists():
            raise ValueError(f"there is no {path}")


def lines_of(page: str) -> Iterator[str]:
    """Every command line of a page."""
    for block in blocks(page, "sh", "bash", "shell", "console"):
        yield from block.text.replace("\\\n", " ").splitlines()
    for text in spans(page):
        words = [word for word in text.split() if not re.match(r"\w+=", word)]
        if len(words) > 1 and Path(words[0]).name in COMMANDS:
            yield text


@pytest.mark.parametrize("page", [page for page in PAGES if any(lines_of(page))])
def test_commands_parse(page: str):
    wrong = []
    for line in lines_of(page):
        try:
            check_line(line)
        except (ValueError, click.ClickException, xdit_compile.XditCompileError) as error:
            wrong.append(f"{line}: {error}")
    assert not wrong


# ---------------------------------------------------------------------------------------------- code in the text


def written_plans(text: str) -> list[Plan]:
    """Every ``Plan(...)`` of a text; ``name=`` alone and ``name=…`` stand for some value."""
    found = []
    for match in re.finditer(r"\bPlan\(", text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        call = re.sub(r"=…?(?=[,)])", "=1", text[match.start() : end])
        found.append(eval(call, {"Plan": Plan}))
    return found


@functools.cache
def all_flags() -> set[str]:
    """The flags of every command there is: our own, torchrun's, those of scripts."""
    own = {name for command in cli.commands.values() for option in command.params for name in option.opts}
    own |= {name for command in cli.commands.values() for option in command.params for name in option.secondary_opts}
    launchers = {name for action in get_args_parser()._actions for name in action.option_strings}
    scripts = {flag for text in sources().values() for flag in re.findall(r'"(--[a-z][\w-]*)"', text)}
    return {_folded(name) for name in own | launchers | scripts | {"--help", "--version"}}


def _folded(flag: str) -> str:
    return flag.replace("-", "_")


def check_span(text: str) -> None:
    """Look at code in a sentence: plans, names of the package, flags, variables of the environment.

    Raises:
        ValueError, TypeError, PlanError: what it names is not there.
    """
    for plan in written_plans(text):
        if "=," not in text:
            plan.check(plan.world_size)
    for name in re.findall(r"\bPlan\.(\w+)", text):
        if not hasattr(Plan, name) and name not in Plan.__dataclass_fields__:
            raise ValueError(f"Plan has no {name}")
    for name in re.findall(r"(?<![\w/])xdit_compile((?:\.\w+)+)", text):
        if not text.startswith("torch.ops."):
            _resolve(f"xdit_compile{name}")
    for flag in FLAG.findall(text) if text.startswith("--") else ():
        if not {_folded(flag), _folded(re.sub(r"^--no_", "--", flag))} & {*all_flags(), "__"}:
            raise ValueError(f"no command has {flag}")
    for name in re.findall(r"\bXDIT_COMPILE_\w+", text):
        flag = f"--{name.removeprefix('XDIT_COMPILE_').lower()}"
        if _folded(flag) not in all_flags() and not any(f'"{name}"' in source for source in sources().values()):
            raise ValueError(f"nothing reads {name}")


def _resolve(name: str) -> Any:
    """A module, or what an object has."""
    found: Any = xdit_compile
    for part in name.split(".")[1:]:
        if not hasattr(found, part) and inspect.ismodule(found):
            try:
                importlib.import_module(f"{found.__name__}.{part}")
            except ModuleNotFoundError:
                raise ValueError(f"there is no {name}") from None
        found = getattr(found, part)
    return found


@pytest.mark.parametrize("page", PAGES)
def test_code_in_sentences_names_what_there_is(page: str):
    wrong = []
    for text in spans(page):
        try:
            check_span(text)
        except (ValueError, TypeError, AttributeError, xdit_compile.XditCompileError) as error:
            wrong.append(f"{text}: {error}")
    assert not wrong


# ---------------------------------------------------------------------------------------------- the worked example


def test_the_worked_example_shows_what_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    namespace, printed = run_page(EXAMPLE)
    shown: dict[str, str] = {}
    for block in blocks(EXAMPLE, "text"):
        head = re.match(r"# (rank\d+/\w+\.py)(, continued)?\n", block.text)
        if head is None:
            assert block.text in printed
            continue
        assert (head[1] in shown) == bool(head[2])
        shown[head[1]] = shown.get(head[1], "") + block.text[head.end() :]
    written = {path.relative_to("dump").as_posix(): path.read_text() for path in Path("dump").glob("rank0/*.py")}
    assert shown == {name: written[name] for name in shown}
    assert set(written.values()) == set(shown.values())
    expected = _shapes(namespace["programs"][0])
    table = re.findall(r"^\| `(\w+)` \| `(\[[\d, ]+\])` \|", read(EXAMPLE), re.MULTILINE)
    assert len(table) > 20
    assert table == [(name, str(expected[name])) for name, _ in table]


def _shapes(program: Any) -> dict[str, list[int]]:
    """The shape of each value of the program's structure, on the meta device: no collective runs."""
    found: dict[str, list[int]] = {}
    structure = program.structures()["part_0"]

    class Recorder(fx.Interpreter):
        def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
            return Recorder(self.fetch_attr(target)).run(*args)

        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            if self.module is structure and isinstance(value, torch.Tensor):
                found[node.name] = list(value.shape)
            return value

    inputs = program.root.graph.find_nodes(op="placeholder")
    Recorder(program.root).run(*(torch.empty_like(node.meta["val"], device="meta") for node in inputs))
    return found


# ---------------------------------------------------------------------------------------------- the checks themselves


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("xdit-compile generate --ulyses_degree 2", "No such option"),
        ("xdit-compile genrate", "No such command"),
        ("xdit-compile generate --nproc 4 --ulysses_degree 2  # two", "needs 2 processes but 4"),
        ("xdit-compile explain --backend inductr", "backend='inductr' is unknown"),
        ("make tests", "no tests"),
        ("make conformance ARG=1", "no ARG"),
        ("A=1 .venv/bin/python benchmarks/none.py", "no benchmarks/none.py"),
        ("python -m op_samples --onyl x", "--onyl"),
        ("python -m opsamples", "no module opsamples"),
        (".venv/bin/python -m pytest tests/none.py -k x", "no tests/none.py"),
        ("torchrun --nproc_per_nod 2 none.py", "none.py|unrecognized"),
        ("srun sh -c 'RANK=1 python none.py'", "no none.py"),
        ("pip install 'xdit-compile[everything]'", "no extra everything"),
    ],
)
def test_a_wrong_command_is_noticed(line: str, words: str):
    with pytest.raises((ValueError, click.ClickException, xdit_compile.XditCompileError)) as told:
        check_line(line)
    error = told.value
    assert re.search(words, error.format_message() if isinstance(error, click.ClickException) else str(error))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Plan(ulyses=2)", "ulyses"),
        ("Plan(vae='tiles')", "vae='tiles' is unknown"),
        ("Plan(data=, ulyses=)", "ulyses"),
        ("Plan.max_program", "max_program"),
        ("xdit_compile.parallelise(pipe)", "parallelise"),
        ("xdit_compile.passes.axes.rules", "rules"),
        ("--use_parallel_vea", "--use_parallel_vea"),
        ("XDIT_COMPILE_DUMPS=folder", "XDIT_COMPILE_DUMPS"),
    ],
)
def test_a_wrong_name_is_noticed(text: str, words: str):
    with pytest.raises((ValueError, TypeError, AttributeError, xdit_compile.XditCompileError), match=words):
        check_span(text)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("parallelize(pipe, Plan(ulyses=2))", TypeError),
        ("parallelize(pipe, Plan(ulysses=2, distrifusion=2))", xdit_compile.XditCompileError),
        ("from xdit_compile import parallelise", ImportError),
        ("xdit_compile.refesh(pipe)", AttributeError),
    ],
)
def test_a_wrong_snippet_is_noticed(text: str, error: type[Exception], plans: list[Plan]):
    with pytest.raises(error):
        execute(Block("docs/plans.md", 1, "python", text), namespace_for("docs/plans.md"))


def test_an_excerpt_that_left_the_source_is_noticed():
    source = " def f(x: int) -> int: y = 2 * x z = y + 1 return z "
    assert stands_in("def f(x: int) -> int:\n    y = 2 * x\n    ...\n    return z", source)
    assert not stands_in("def f(x: int) -> int:\n    y = 3 * x\n    ...\n    return z", source)
    assert not stands_in("return z\n...\ndef f(x: int) -> int:", source)
