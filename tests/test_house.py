"""The rules of the house that can be checked by reading: imports run one way, no model is named, files are rooms."""

from __future__ import annotations

import ast
import collections
import functools
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

ROOT = Path(__file__).resolve().parent.parent
LINKED = ("passes", "kernels", "backends")
PACKAGES = [ROOT / "xdit_compile", *(ROOT / name for name in LINKED)]
FLOORS = (
    "errors plan distributed ir weights capture.state cache capture kernels.attention_packages kernels.collectives "
    "kernels passes.axes passes.local passes.rules passes.lowering passes.partition passes.choose passes.stages "
    "passes.memory passes.heads passes.across passes.fuse backends.target backends.folders backends reports.counting "
    "compiler reports runtime.tensors runtime.verify runtime.stored runtime runtime.methods api evaluation "
    "cli.parsing cli.inputs cli.options cli.checks cli.processes cli.running serving.queue serving.ranks serving.http "
    "serving integrations.ray integrations.comfyui "
    "cli.commands cli __main__"
).split()
"""Folders, and files that stand alone, from the ground up: each imports from those below alone."""
LONGEST_CHAIN = 19
MOST_ENTRIES = 20
MOST_FILES = 15
MOST_OVERRULED = 15
NEUTRAL_CLASSES = {"DiffusionPipeline", "ModelMixin", "AutoModel", "CacheMixin"}
SAY_NOTHING = {"at", "found", "part", "given", "own"}
LONG_LIFE = 3
"""Lines over which a local name must say what it holds."""
MODEL_WORDS = re.compile(
    r"\b(transformer_blocks|single_transformer_blocks|to_q|to_k|to_v|to_out|attn1|attn2|norm1|ff_context|pos_embed|"
    r"encoder_hidden_states|hidden_states|pooled_projections|image_rotary_emb|img_ids|txt_ids)\b"
)


@functools.cache
def sources() -> dict[str, Path]:
    """Every module of the package by its full name."""
    found = {}
    for folder in PACKAGES:
        for path in folder.rglob("*.py"):
            parts = [*([] if folder.name == "xdit_compile" else ["xdit_compile"]), *path.relative_to(ROOT).parts]
            if not any(parent.is_symlink() for parent in path.parents):
                names = [*parts[:-1], *([path.stem] if path.stem != "__init__" else [])]
                found[".".join(names)] = path
    return found


def floor_of(module: str) -> str | None:
    """The folder of a module, or the module itself where it stands alone; None for what only holds others."""
    name = module.removeprefix("xdit_compile").removeprefix(".")
    if name in FLOORS:
        return name
    folder = name.rpartition(".")[0]
    if not name or any(floor.startswith(f"{name}.") for floor in FLOORS):
        return None
    if folder not in FLOORS:
        pytest.fail(f"{module} has no place in FLOORS: say where it stands")
    return folder


@functools.cache
def imports_of(module: str) -> set[str]:
    """The package's own modules that ``module`` imports, inside functions and for types alone too."""
    known, path = sources(), sources()[module]
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            inner = {f"{target}.{alias.name}" for alias in node.names}
            found |= inner & set(known) or {target}
    return {name for name in found if name in known} - {module}


def floors() -> dict[str, set[str]]:
    """What each floor imports from, itself not among them."""
    found: dict[str, set[str]] = {}
    for module in sources():
        here = floor_of(module)
        if here is not None:
            found.setdefault(here, set()).update(floor_of(other) or "" for other in imports_of(module))
    return {here: others - {here, ""} for here, others in found.items()}


def test_imports_run_one_way():
    wrong = [
        f"{module} imports {other}"
        for module in sources()
        for other in imports_of(module)
        if (here := floor_of(module)) and (there := floor_of(other)) and FLOORS.index(there) > FLOORS.index(here)
    ]
    assert not wrong


def test_no_import_is_part_of_a_circle():
    rest = {module: imports_of(module) for module in sources() if module != "xdit_compile"}
    while ends := [module for module, others in rest.items() if not others & set(rest)]:
        for module in ends:
            del rest[module]
    assert {module: sorted(others & set(rest)) for module, others in rest.items()} == {}


def test_no_chain_of_folders_is_long():
    graph = floors()
    alone = {
        floor for floor in FLOORS if sources().get(f"xdit_compile.{floor}", Path("__init__.py")).stem != "__init__"
    }

    @functools.cache
    def depth(floor: str) -> int:
        return (floor not in alone) + max((depth(other) for other in graph.get(floor, ())), default=0)

    assert max(map(depth, graph)) <= LONGEST_CHAIN


def test_folders_are_rooms():
    for folder in (ROOT / "xdit_compile", ROOT / "passes"):
        assert len([path for path in folder.iterdir() if path.name not in ("__pycache__", "py.typed")]) <= MOST_ENTRIES
    counts = collections.Counter(path.parent for path in sources().values())
    assert max(counts.values()) <= MOST_FILES
    public = {"parallelize", "restore", "refresh", "explain", "generation", "from_pretrained", "local_device"}
    assert not public & {folder.name for folder in counts}


def test_the_three_folders_are_imported_only_through_the_package():
    bare = re.compile(r"^\s*(from|import)\s+(passes|kernels|backends)\b", re.MULTILINE)
    files = [*sources().values(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    assert [str(path) for path in files if bare.search(path.read_text())] == []


def test_kernels_is_no_regular_package_and_the_links_are_in_place():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for name in ("passes", "kernels", "backends"):
        assert (ROOT / "xdit_compile" / name).is_symlink()
        assert (ROOT / "xdit_compile" / name).resolve() == ROOT / name


def test_no_model_or_pipeline_class_is_named():
    structure = diffusers._import_structure
    names = {name for name in [*structure["models"], *structure["pipelines"]] if name[0].isupper()} - NEUTRAL_CLASSES
    assert len(names) > 300
    pattern = re.compile(r"\b(" + "|".join(sorted(names)) + r")\b")
    found = {str(path): pattern.findall(path.read_text()) for path in sources().values()}
    assert {path: hits for path, hits in found.items() if hits} == {}


def test_no_model_is_recognised_by_the_names_of_its_parts():
    found = {}
    for path in sources().values():
        hits = [text for text in _strings(ast.parse(path.read_text())) if MODEL_WORDS.search(text)]
        if hits:
            found[str(path)] = hits
    assert found == {}


def _strings(tree: ast.AST) -> list[str]:
    """String constants that are no docstring."""
    documents = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                documents.add(id(first.value))
    constants = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in documents]
    return [node.value for node in constants if isinstance(node.value, str)]


def test_files_are_rooms_and_functions_fit_a_screen():
    too_long = []
    for path in sources().values():
        text = path.read_text()
        if len(text.splitlines()) > 420:
            too_long.append(f"{path.name}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines > 60:
                    too_long.append(f"{path.name}: {node.name} has {lines} lines")
    assert not too_long


@pytest.mark.slow
def test_nothing_is_written_twice():
    """By pylint's measure: no six lines alike, comments, docstrings, imports and signatures apart."""
    ignored = [f"--ignore-{what}=y" for what in ("imports", "signatures", "comments", "docstrings")]
    checked = ["--disable=all", "--enable=duplicate-code", "--min-similarity-lines=6", *ignored, "--score=n"]
    command = [sys.executable, "-m", "pylint", *checked, "--persistent=n", "--recursive=y", "xdit_compile", *LINKED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_local_names_say_what_they_hold():
    vague = []
    for path in sources().values():
        if path.is_relative_to(ROOT / "kernels") or path.is_relative_to(ROOT / "backends"):
            continue
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, ast.FunctionDef | ast.Lambda):
                for name, lines in _lives(function).items():
                    if max(lines) - min(lines) >= LONG_LIFE:
                        vague.append(f"{path.name}:{min(lines)}: {name}")
    assert vague == []


def _lives(function: ast.FunctionDef | ast.Lambda) -> dict[str, list[int]]:
    """The lines in which a function, but for those inside of it, has names that say nothing."""
    lines: dict[str, list[int]] = {}
    pending = list(ast.iter_child_nodes(function))
    while pending:
        node = pending.pop()
        name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else None
        if name in SAY_NOTHING:
            lines.setdefault(name, []).append(node.lineno)
        if not isinstance(node, ast.FunctionDef | ast.Lambda):
            pending += ast.iter_child_nodes(node)
    return lines


def test_types_are_seldom_overruled():
    overruled = re.compile(r"# type: ignore|\bcast\(")
    assert sum(len(overruled.findall(path.read_text())) for path in sources().values()) <= MOST_OVERRULED


def test_every_module_and_public_function_says_what_it_does():
    silent = []
    for path in sources().values():
        tree = ast.parse(path.read_text())
        if tree.body and not ast.get_docstring(tree):
            silent.append(path.name)
        for node in tree.body:
            named = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            public = named and not node.decorator_list
            if public and not ast.get_docstring(node):
                silent.append(f"{path.name}: {node.name}")
    assert not silent


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, xdit_compile, xdit_compile.cli.main;"
        "print(sorted({'torch', 'diffusers', 'numpy', 'scipy', 'torchmetrics'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
