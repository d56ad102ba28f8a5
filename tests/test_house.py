"""The rules of the house that can be checked by reading: imports run one way, no model is named, files are rooms."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {
    "xdit_compile": ROOT / "xdit_compile",
    "xdit_compile.evaluation": ROOT / "xdit_compile" / "evaluation",
    "xdit_compile.passes": ROOT / "passes",
    "xdit_compile.kernels": ROOT / "kernels",
    "xdit_compile.backends": ROOT / "backends",
}
CAPTURE = (
    "results containers versions released samples program flatten memory weights checkpoint tracing values valued "
    "writes unsupported decompose simplify blocks outline interpret plainly kept_modules by_modules preserve digest "
    "attributes signature unchanged bound guards capture separate in_place cutting precision"
)
RUNTIME = (
    "simulated sketch calls liveness peers agreement lookout request_facts shared_inputs turns session verification "
    "programs unsplit later build report dump deferred guidance pipelines empty runtime draws autoencoder "
    "distvae_provider recognized generations patch_parts patched independence batches messages pipes halves pipefusion "
    "distrifusion pipeline_report smaller room proving"
)
COMMANDS = "request evaluation_request output pipeline_call reference generate evaluate weightless launch cli __main__"
LAYERS = [
    {"xdit_compile.errors"},
    {"xdit_compile.environment", "xdit_compile.plan", "xdit_compile.world", "xdit_compile.model_folder"},
    {"xdit_compile.devices", "xdit_compile.mesh", "xdit_compile.watchdog"},
    {"xdit_compile.seats"},
    {"xdit_compile.axes", "xdit_compile.shards"},
    {f"xdit_compile.{name}" for name in CAPTURE.split()},
    {"xdit_compile.kernels"},
    {"xdit_compile.passes"},
    {"xdit_compile.backends"},
    {"xdit_compile.cache"},
    {f"xdit_compile.{name}" for name in RUNTIME.split()},
    {"xdit_compile.api"},
    {"xdit_compile.loading"},
    {"xdit_compile.evaluation"},
    {f"xdit_compile.{name}" for name in COMMANDS.split()},
]
NEUTRAL_CLASSES = {"DiffusionPipeline", "ModelMixin", "AutoModel", "CacheMixin"}
MODEL_WORDS = re.compile(
    r"\b(transformer_blocks|single_transformer_blocks|to_q|to_k|to_v|to_out|attn1|attn2|norm1|ff_context|pos_embed|"
    r"encoder_hidden_states|hidden_states|pooled_projections|image_rotary_emb|img_ids|txt_ids)\b"
)


def sources() -> dict[str, Path]:
    """Every module of the package by its full name."""
    return {
        f"{package}.{path.stem}" if path.stem != "__init__" else package: path
        for package, folder in FOLDERS.items()
        for path in folder.glob("*.py")
    }


def layer_of(module: str) -> int | None:
    """The place of a module in the order of imports; the package itself stands outside of it."""
    if module == "xdit_compile":
        return None
    for place, layer in enumerate(LAYERS):
        if module in layer or module.rpartition(".")[0] in layer:
            return place
    pytest.fail(f"{module} has no place in LAYERS: say where it stands")


def imports_of(module: str, path: Path) -> set[str]:
    """The package's own modules that ``module`` imports, inside functions too."""
    known = sources()
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
    return {name for name in found if name in known or name in FOLDERS}


def test_imports_run_one_way():
    wrong = []
    for module, path in sources().items():
        here = layer_of(module)
        for other in imports_of(module, path):
            there = layer_of(other)
            if here is not None and there is not None and there > here:
                wrong.append(f"{module} imports {other}")
    assert not wrong


def test_the_three_folders_are_imported_only_through_the_package():
    bare = re.compile(r"^\s*(from|import)\s+(passes|kernels|backends)\b", re.MULTILINE)
    files = [*sources().values(), *(ROOT / "tests").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
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
                if lines > 65:
                    too_long.append(f"{path.name}: {node.name} has {lines} lines")
    assert not too_long


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
        "import sys, xdit_compile, xdit_compile.cli;"
        "print(sorted({'torch', 'diffusers', 'numpy', 'scipy', 'torchmetrics'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
