"""Which source files a program was made from, and whether they are still the same."""

from __future__ import annotations

import ast
import cProfile
import hashlib
import importlib.machinery
import itertools
import linecache
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any

from .unportable import Unportable

COVERED = ("torch", "torchgen", "functorch", "triton", "numpy", "xdit_compile")
"""Packages whose files are left out: their versions are known, or, of this one, a digest of all its files."""
INSTALLED = ("site-packages", "dist-packages")
PACKAGE = Path(__file__).parent.parent
UNNAMED = ("<frozen ", "<eval_with_key>")
"""What frames without a file of their own begin with: Python's own, and graphs that were traced from others."""
DATACLASS = "__create_fn__ __init__ __repr__ __eq__ __hash__ __lt__ __le__ __gt__ __ge__ __setattr__ __delattr__"
TEXTS = frozenset(["<module>", *DATACLASS.split()])
"""Names of code that was no file but a text: what was evaluated, and methods of dataclasses."""
OF_NAMES = (("<lambda>", ("_tuple_new",)), ("<lambda>", ("fn",)), ("_", ("torch", "_assert")))
"""Names of further such code, with the first names that it uses."""
MODULE, FILE, CELL = "module:", "file:", "cell:"
"""How keys of a manifest begin: what can be imported, other files by their path, cells of notebooks by content."""


class Recording:
    """The files that ran while it was made, by the names that code has for them.

    Attributes:
        files: names of files, and names in angle brackets.
        incomplete: why there may be others, or the code that ran may be older than its file; None where all are known.
    """

    def __init__(self) -> None:
        self.files: frozenset[str] = frozenset()
        self.incomplete: str | None = None


@contextmanager
def recorded() -> Iterator[Recording]:
    """Collect which Python files run in this thread until it is left.

    Python's own C profiler counts the functions that are called, with some 0.2 us for each call. That is little where
    a module runs and much where it is traced. Frames that were entered before are not seen.
    """
    recording, profile = Recording(), cProfile.Profile(subcalls=False, builtins=False)
    started = _started(profile)
    try:
        yield recording
    finally:
        still = started and _is_active(profile)
        if started:
            _stop(profile)
        codes = {entry.code for entry in profile.getstats() if isinstance(entry.code, CodeType)} if started else set()
        recording.files = frozenset(code.co_filename for code in codes if not _is_generated(code))
        if not started:
            recording.incomplete = "another profiler was active"
        elif not still:
            recording.incomplete = "another profiler took over"
        else:
            recording.incomplete = _changed_since_import(codes)


class Digests:
    """Digests of files, each read once for as long as it stays as it is."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, int], str] = {}

    def of(self, path: str) -> str:
        """The SHA-256 of a file, in hex.

        Raises:
            OSError: it cannot be read.
        """
        state = os.stat(path)
        key = (path, state.st_mtime_ns, state.st_size, state.st_ino)
        if key not in self._known:
            self._known[key] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return self._known[key]


def manifest(files: Iterable[str], digests: Digests | None = None) -> dict[str, str]:
    """The digest of each file by a key under which it is found again.

    Left out are torch, triton, numpy, the standard library and this package. To a file that is not installed as a
    part of a package those that it imports are added, and what they import: it may have taken numbers from them.

    Args:
        files: names of files as code has them.
        digests: what is known of files already.

    Raises:
        Unportable: code that has no file, and no cell of a notebook either.
    """
    digests = Digests() if digests is None else digests
    names, covered = _names_by_file(), _covered_folders()
    entries: dict[str, str] = {}
    pending, seen = [name for name in files if not name.startswith(UNNAMED)], set()
    while pending:
        path = pending.pop()
        if path in seen or _is_covered(path, names.get(os.path.abspath(path)), covered):
            continue
        seen.add(path)
        if os.path.isfile(path):
            name = names.get(os.path.abspath(path))
            known = name is not None and _located(name) == os.path.abspath(path)
            entries[f"{MODULE}{name}" if known else f"{FILE}{os.path.abspath(path)}"] = digests.of(path)
            if not _is_installed(path):
                pending += _imported_by(path, name)
        elif (cell := _cell(path)) is not None:
            entries[f"{CELL}{cell}"] = cell
        else:
            raise Unportable(f"code of {path} ran, which is no file that another process could compare")
    return dict(sorted(entries.items()))


def fits(entries: Mapping[str, str], digests: Digests | None = None) -> str | None:
    """Whether all files of a manifest have the content they had: None, or which one has not, in words.

    No module is imported to find its file.

    Args:
        digests: what is known of files already.
    """
    digests = Digests() if digests is None else digests
    cells: set[str] | None = None
    for key, digest in entries.items():
        kind, _, name = key.partition(":")
        if f"{kind}:" == CELL:
            cells = {cell for path in linecache.cache if (cell := _cell(path)) is not None} if cells is None else cells
            if name not in cells:
                return "a cell of a notebook was changed, or did not run yet"
            continue
        path = (_loaded(name) or _located(name)) if f"{kind}:" == MODULE else name
        try:
            if path is None or digests.of(path) != digest:
                return f"{path or name} {'was changed' if path else 'is not there'}"
        except OSError:
            return f"{path} is not there"
    return None


def own_sources(package: Path = PACKAGE) -> str:
    """A digest of all Python files of this package, in 64 hex digits; folders that are linked into it count."""
    state = hashlib.sha256()
    paths = []
    for folder, folders, names in os.walk(package, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    for path in sorted(paths):
        content = Path(path).read_bytes()
        state.update(f"{os.path.relpath(path, package)}\0{len(content)}\0".encode())
        state.update(content)
    return state.hexdigest()


def _started(profile: cProfile.Profile) -> bool:
    """Whether a profiler could be started; in Python 3.11 it would take the place of another one."""
    if sys.getprofile() is not None:
        return False
    try:
        profile.enable()
    except ValueError:  # Python 3.12 says so
        return False
    return True


def _stop(profile: cProfile.Profile) -> None:
    """Stop a profiler. In Python 3.11 that stops another one, too, that took its place: it is started again."""
    active = sys.getprofile()
    profile.disable()
    if isinstance(active, cProfile.Profile) and active is not profile:
        active.enable()
    elif active is not None and active is not profile:
        sys.setprofile(active)


def _is_active(profile: cProfile.Profile) -> bool:
    monitoring = getattr(sys, "monitoring", None)
    if monitoring is not None:
        return monitoring.get_tool(monitoring.PROFILER_ID) is not None and sys.getprofile() is None
    return sys.getprofile() is profile


def _is_generated(code: CodeType) -> bool:
    """Whether code is a method that Python's dataclasses or named tuples made of a class, or was a text until it ran.

    Of such a text, as an annotation that is evaluated, the code that had it run is recorded itself. PyTorch has some
    run while a module is traced: a function of so many arguments that calls another one, and checks of sizes.
    """
    if code.co_filename != "<string>":
        return False
    return code.co_name in TEXTS or (code.co_name, code.co_names[:2]) in OF_NAMES


def _changed_since_import(codes: Iterable[CodeType]) -> str | None:
    """Which file, if any, does not hold the code that ran of it any more; installed files are not looked at."""
    covered = _covered_folders()
    by_file: dict[str, set[CodeType]] = {}
    for code in codes:
        path = code.co_filename
        if os.path.isfile(path) and not _is_installed(path) and not _is_covered(path, None, covered):
            by_file.setdefault(path, set()).add(code)
    for path, ran in sorted(by_file.items(), key=lambda entry: entry[0]):
        try:
            there = _codes_in(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True))
        except (OSError, SyntaxError, ValueError):
            there = set()
        if not ran <= there:
            return f"{path} was changed after it was imported, or imported otherwise than it is written"
    return None


def _codes_in(code: CodeType) -> set[CodeType]:
    codes, pending = set(), [code]
    while pending:
        each = pending.pop()
        codes.add(each)
        pending += [constant for constant in each.co_consts if isinstance(constant, CodeType)]
    return codes


def _names_by_file() -> dict[str, str]:
    """Names of the modules that are loaded, by the absolute paths of their files; of several the first in order."""
    names: dict[str, str] = {}
    for name, module in sorted(sys.modules.items()):
        path = getattr(module, "__dict__", {}).get("__file__")
        if isinstance(path, str) and name not in ("__main__", "__mp_main__"):
            names.setdefault(os.path.abspath(path), name)
    return names


def _loaded(name: str) -> str | None:
    """The file of a module that is loaded."""
    path = getattr(sys.modules.get(name), "__dict__", {}).get("__file__")
    return path if isinstance(path, str) else None


def _located(name: str) -> str | None:
    """The absolute path of the file that an import of a name would load. Nothing is imported."""
    search: Any = None
    spec: importlib.machinery.ModuleSpec | None = None
    for full_name in itertools.accumulate(name.split("."), "{}.{}".format):
        finders = (getattr(finder, "find_spec", None) for finder in sys.meta_path)
        specs = (find(full_name, search) for find in finders if find is not None)
        spec = next((each for each in specs if each is not None), None)
        if spec is None:
            return None
        search = spec.submodule_search_locations
    return None if spec is None or not spec.has_location else os.path.abspath(str(spec.origin))


def _covered_folders() -> tuple[str, ...]:
    """Folders of Python's own files, and of the packages that are left out."""
    folders = {sysconfig.get_paths()[kind] for kind in ("stdlib", "platstdlib")}
    folders |= {os.path.dirname(path) for name in COVERED if (path := _loaded(name)) is not None}
    folders |= {os.path.realpath(inner) for inner in PACKAGE.iterdir() if inner.is_symlink()}
    return tuple(sorted({each + os.sep for folder in folders for each in (folder, os.path.realpath(folder))}))


def _is_covered(path: str, name: str | None, covered: tuple[str, ...]) -> bool:
    if name is not None and name.partition(".")[0] in COVERED:
        return True
    path = os.path.abspath(path)
    return next(
        (True for folder in covered if path.startswith(folder) and not _is_installed(path[len(folder) :])), False
    )


def _is_installed(path: str) -> bool:
    return any(folder in Path(path).parts for folder in INSTALLED)


def _imported_by(path: str, name: str | None) -> list[str]:
    """The files of modules that a file says it imports, as far as they are loaded and no part of an installed package.

    Args:
        name: of the module that the file is, for what it imports by places beside its own.
    """
    base = name if name is not None and os.path.basename(path) == "__init__.py" else (name or "").rpartition(".")[0]
    asked: set[str] = set()
    for node in ast.walk(ast.parse(Path(path).read_bytes())):
        if isinstance(node, ast.Import):
            asked |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            outer = base.split(".")[: len(base.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*outer, *([node.module] if node.module else [])])
            asked |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    files = [found for each in sorted(asked) if (found := _loaded(each)) is not None and found.endswith(".py")]
    return [file for file in files if not _is_installed(file)]


def _cell(path: str) -> str | None:
    """The digest of what was typed in, as a cell of a notebook, and goes by a name of a file that is none."""
    known = linecache.cache.get(path)
    if known is None or len(known) == 1 or known[1] is not None:
        return None
    return hashlib.sha256("".join(known[2]).encode()).hexdigest()
