"""The commands of the cache of compiled programs: what it holds, whether that is sound, and making room."""

from __future__ import annotations

import datetime
import io
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from xdit_compile.cache.folder import VARIABLE, resolve
from xdit_compile.cache.seal import KEY_NAME
from xdit_compile.cache.store import Listed, Store
from xdit_compile.cli.options.request import DEVICES
from xdit_compile.cli.parsing.choices import Choices
from xdit_compile.cli.parsing.groups import COMPILE, Group, option
from xdit_compile.cli.processes.ending import INDUCTOR_FILES
from xdit_compile.cli.processes.speech import doing
from xdit_compile.errors import UsageError, XditCompileError
from xdit_compile.plan.plan import bytes_in

_SHORT = 12
"""Letters of a name that a table shows."""
_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10))


class _Bytes(click.ParamType):
    """A number of bytes, or such as 2GiB or 800MB."""

    name = "size"

    def convert(self, value: Any, parameter: click.Parameter | None, context: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        size = bytes_in(str(value))
        if size is None:
            self.fail(f"{value!r} is no number of bytes, such as 2GiB or 800MB", parameter, context)
        return size


def _folder_flag(command: Callable[..., Any]) -> Callable[..., Any]:
    return option(
        "--cache_dir",
        group=COMPILE,
        type=click.Path(),
        help=f"Its folder.  [default: what {VARIABLE} names, or your cache folder]",
    )(command)


@click.group(cls=Group)
def cache() -> None:
    """Look after the folder where compiled programs are kept from run to run."""


@cache.command("list")
@_folder_flag
def list_entries(cache_dir: str | None) -> None:
    """Say what is kept."""
    folder = _folder(cache_dir)
    store = _store(folder)
    with doing("reading entries"):
        checked = store.verify() if store else []
    listed = [one for one, sound in checked if sound]
    if listed:
        click.echo(_table(listed))
    broken = len(checked) - len(listed)
    click.echo(f"{_amount(listed)} in {folder}" + (f", and {broken} broken, which verify names" if broken else ""))


@cache.command()
@_folder_flag
@click.argument("name")
def show(cache_dir: str | None, name: str) -> None:
    """Say what one entry is about: NAME is its name or how that begins, as list has it."""
    folder = _folder(cache_dir)
    store = _store(folder)
    fitting = [listed for listed in store.listed() if listed.name.startswith(name)] if store else []
    if len(fitting) != 1:
        several = f"is how {len(fitting)} begin: {', '.join(map(_called, fitting[:5]))}; give more of it"
        raise UsageError(f"{name} {several if fitting else 'is the name of nothing'} in {folder}; cache list has all")
    checked = store.verify(fitting) if store else []
    if not all(sound for _, sound in checked):
        raise XditCompileError(f"{_called(fitting[0])} in {folder} is broken; clear removes it")
    for listed, _ in checked:
        facts = {"kind": listed.kind, "name": listed.name, "size": _size(listed.size), "last used": _when(listed.used)}
        click.echo("\n".join(_lines(facts | {"about": listed.about})))


@cache.command()
@_folder_flag
def verify(cache_dir: str | None) -> None:
    """Check every seal; the exit code is 1 where something is broken."""
    folder = _folder(cache_dir)
    store = _store(folder)
    with doing("reading entries"):
        checked = store.verify() if store else []
    broken = [listed for listed, sound in checked if not sound]
    for listed in broken:
        click.echo(f"broken: {listed.kind}/{listed.name}")
    if broken:
        raise XditCompileError(
            f"{len(broken)} of {_count(len(checked))} broken in {folder}; what is wanted again is compiled anew"
        )
    click.echo(f"{_amount([listed for listed, _ in checked])} in {folder}, all sound")


@cache.command()
@_folder_flag
@option("--limit", group=COMPILE, type=_Bytes(), required=True, help="Bytes that may stay, such as 2GiB.")
def prune(cache_dir: str | None, limit: int) -> None:
    """Remove what was used least recently, until the rest is small enough."""
    folder = _folder(cache_dir)
    store = _store(folder)
    removed = store.prune(limit) if store else []
    _tell_removed(folder, removed, store.listed() if store else [], limit)


@cache.command()
@_folder_flag
def clear(cache_dir: str | None) -> None:
    """Remove everything that is kept."""
    folder = _folder(cache_dir)
    store = _store(folder)
    removed = store.clear() if store else []
    shutil.rmtree(folder / INDUCTOR_FILES, ignore_errors=True)
    _tell_removed(folder, removed, store.listed() if store else [], 0)


@cache.command()
@_folder_flag
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "--digest",
    group=COMPILE,
    required=True,
    help="What build printed of the file: compiled code is trusted by that alone.",
)
@option("--device", group=COMPILE, type=Choices(DEVICES, strict=True), default="auto", help="What it is for.")
def unpack(cache_dir: str | None, file: Path, digest: str, device: str) -> None:
    """Take in what build packed on another machine."""
    with doing(f"taking {file} in"):
        import torch

        from xdit_compile.cache.bundle import unpack as take_in
        from xdit_compile.distributed.devices import local_device

        store = Store(_folder(cache_dir))
        place = local_device() if device == "auto" else torch.device(device)
        count = take_in(store, file, digest, place)
    click.echo(f"{_count(count)} taken into {store.folder}")


def _tell_removed(folder: Path, removed: Sequence[Listed], rest: Sequence[Listed], limit: int) -> None:
    """Say what is gone.

    Raises:
        XditCompileError: more than ``limit`` bytes are left.
    """
    click.echo(f"removed {_amount(removed)} from {folder}")
    if sum(listed.size for listed in rest) > limit:
        raise XditCompileError(f"{_amount(rest)} in {folder} could not be removed; see who may write there")


def _folder(cache_dir: str | None) -> Path:
    folder = resolve("auto" if cache_dir is None else cache_dir)
    if folder is None:
        raise UsageError(f"there is no cache, as {VARIABLE} says; give its folder with --cache_dir")
    return folder


def _store(folder: Path) -> Store | None:
    """The cache in a folder; None where there is none, as looking for one does not make it."""
    return Store(folder) if os.path.lexists(folder / KEY_NAME) else None


def _table(entries: Sequence[Listed]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("kind", "name", "size", "last used", "for")
    for listed in sorted(entries, key=lambda listed: -listed.used):
        cells = (
            listed.kind,
            listed.name[:_SHORT],
            _size(listed.size),
            _when(listed.used),
            str(listed.about.get("for", "")),
        )
        table.add_row(*map(Text, cells))
    written = io.StringIO()
    Console(file=written, width=120, color_system=None).print(table)
    return written.getvalue().rstrip()


def _lines(facts: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Facts as lines, those of a mapping below its name."""
    for name, fact in facts.items():
        if isinstance(fact, dict) and fact:
            yield f"{indent}{name}:"
            yield from _lines(fact, indent + "  ")
        elif isinstance(fact, list):
            yield f"{indent}{name}: {', '.join(map(str, fact))}"
        else:
            yield f"{indent}{name}: {fact}"


def _amount(entries: Sequence[Listed]) -> str:
    return f"{_count(len(entries))}, {_size(sum(listed.size for listed in entries))}"


def _count(number: int) -> str:
    return f"{number} {'entry' if number == 1 else 'entries'}"


def _called(listed: Listed) -> str:
    return f"{listed.kind}/{listed.name[:_SHORT]}"


def _size(size: int) -> str:
    for unit, factor in _UNITS:
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size} bytes"


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")
