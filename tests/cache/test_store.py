"""The cache on disk: what is read is what was written, by this user, under this name; anything else is noticed."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from xdit_compile.cache.folder import resolve
from xdit_compile.cache.seal import FORMAT, BrokenSealError, key_of, opened, private_folder, seal
from xdit_compile.cache.store import Store
from xdit_compile.cli.main import main
from xdit_compile.errors import UsageError

NAME, OTHER = "0123456789abcdef", "fedcba9876543210"
ABOUT = {"for": "denoiser [4, 8]", "made": {"torch": "2.13", "ranks": [0, 1]}}
BODY = bytes(range(100))
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A cache with one entry."""
    store = Store(tmp_path / "cache")
    assert store.write("program", NAME, ABOUT, BODY)
    return store


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that a process of another user can reach and owns, as pytest's own cannot be."""
    with tempfile.TemporaryDirectory() as made:
        if os.geteuid() == 0:
            os.chown(made, NOBODY, NOBODY)
        yield Path(made)


def child(code: str, *arguments: object) -> list[str]:
    """Run some lines with the cache imported in a process of its own, and give its warnings and then what it prints."""
    head = "import os, sys, resource; from pathlib import Path; from xdit_compile.cache.store import Store\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [*done.stderr.splitlines(), *done.stdout.splitlines()]


def inside(folder: Path) -> list[str]:
    """Every file below a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir())


def test_what_is_written_is_read(store: Store):
    entry = store.read("program", NAME)
    assert entry is not None
    assert (entry.kind, entry.name, entry.about, entry.body) == ("program", NAME, ABOUT, BODY)
    assert store.read("code", NAME) is None and store.read("program", OTHER) is None
    assert store.write("program", NAME, {}, b"") and store.write("code", NAME, {}, b"\0" * 10)
    again = Store(store.folder)
    empty, code = again.read("program", NAME), again.read("code", NAME)
    assert empty is not None and (empty.about, empty.body) == ({}, b"")
    assert code is not None and code.body == b"\0" * 10
    assert inside(store.folder) == [f"code/{NAME}", "key", f"program/{NAME}"]


def test_only_the_user_can_read_what_is_kept(store: Store):
    modes = {path.name: path.stat().st_mode & 0o777 for path in [store.folder, *store.folder.rglob("*")]}
    assert modes == {"cache": 0o700, "program": 0o700, "key": 0o600, NAME: 0o600}


@pytest.mark.parametrize("pattern", [0x01, 0xFF])
def test_every_changed_byte_is_noticed(store: Store, caplog: pytest.LogCaptureFixture, pattern: int):
    path = store.folder / "program" / NAME
    sealed = path.read_bytes()
    assert 200 < len(sealed) < 400
    for position in range(len(sealed)):
        changed = bytearray(sealed)
        changed[position] ^= pattern
        path.write_bytes(changed)
        assert store.read("program", NAME) is None, position
        assert not path.exists()
    assert len(caplog.records) == len(sealed)
    assert all(record.name == "xdit_compile" and str(path) in record.getMessage() for record in caplog.records)


def test_every_length_but_its_own_is_noticed(store: Store, caplog: pytest.LogCaptureFixture):
    path = store.folder / "program" / NAME
    sealed = path.read_bytes()
    for wrong in [*(sealed[:length] for length in range(len(sealed))), sealed + b"\0", sealed + sealed]:
        path.write_bytes(wrong)
        assert store.read("program", NAME) is None
        assert not path.exists()
    assert len(caplog.records) == len(sealed) + 2
    assert "cut short" in caplog.records[0].getMessage() and "seal does not fit" in caplog.records[-1].getMessage()


def test_a_key_with_a_changed_byte_opens_nothing(store: Store):
    path, key = store.folder / "program" / NAME, store.folder / "key"
    sealed, secret = path.read_bytes(), key.read_bytes()
    assert len(secret) == 32
    for position in range(len(secret)):
        for pattern in (0x01, 0xFF):
            changed = bytearray(secret)
            changed[position] ^= pattern
            key.write_bytes(changed)
            path.write_bytes(sealed)
            assert Store(store.folder).read("program", NAME) is None
    key.write_bytes(secret)
    path.write_bytes(sealed)
    assert Store(store.folder).read("program", NAME) is not None


@pytest.mark.parametrize(("kind", "name"), [("program", OTHER), ("code", NAME), ("program", NAME * 2)])
def test_no_entry_stands_in_for_another(store: Store, caplog: pytest.LogCaptureFixture, kind: str, name: str):
    target = store.folder / kind / name
    target.parent.mkdir(exist_ok=True)
    shutil.copy(store.folder / "program" / NAME, target)
    assert store.read(kind, name) is None
    assert f"sealed as program/{NAME}" in caplog.text and not target.exists()
    assert store.read("program", NAME) is not None


def test_no_byte_moves_from_one_field_to_the_next():
    key = bytes(32)
    sealed = seal(key, "ab", "cd", {}, b"ef")
    assert opened(key, "ab", "cd", sealed) == ({}, b"ef")
    assert sealed != seal(key, "a", "bcd", {}, b"ef") and sealed != seal(key, "abc", "d", {}, b"ef")
    for kind, name in [("a", "bcd"), ("abc", "d"), ("", "abcd"), ("abcd", "")]:
        with pytest.raises(BrokenSealError, match="sealed as ab/cd"):
            opened(key, kind, name, sealed)


def test_another_format_is_named_and_removed(store: Store, caplog: pytest.LogCaptureFixture):
    path = store.folder / "program" / NAME
    sealed = path.read_bytes()
    position = sealed.index(b"\n") + 1
    path.write_bytes(sealed[:position] + (FORMAT + 1).to_bytes(4, "big") + sealed[position + 4 :])
    assert store.read("program", NAME) is None
    assert f"of format {FORMAT + 1}" in caplog.text and not path.exists()


def test_the_seal_is_of_the_format_too(monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as later:
        later.setattr("xdit_compile.cache.seal.FORMAT", FORMAT + 1)
        sealed = seal(bytes(32), "ab", "cd", {}, b"ef")
    position = sealed.index(b"\n") + 1
    with pytest.raises(BrokenSealError, match="seal does not fit"):
        opened(bytes(32), "ab", "cd", sealed[:position] + FORMAT.to_bytes(4, "big") + sealed[position + 4 :])


def test_links_and_pipes_are_no_entries(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = store.folder / "program" / NAME
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    assert store.read("program", NAME) is None
    assert not os.path.lexists(path) and (tmp_path / "moved").exists()
    os.mkfifo(path)
    assert store.read("program", NAME) is None
    assert not path.exists()
    path.mkdir()
    assert store.read("program", NAME) is None and store.read("program", NAME) is None
    assert [record.getMessage().count("no regular file") for record in caplog.records] == [1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("program", "../key"),
        ("program", "0" * 7),
        ("program", "0" * 129),
        ("program", NAME.upper()),
        ("program", NAME + "\n"),
        ("program", ""),
        ("..", NAME),
        ("a/b", NAME),
        ("", NAME),
        ("key", NAME),
        ("Program", NAME),
    ],
)
def test_only_words_and_digests_are_names(store: Store, kind: str, name: str):
    before = inside(store.folder)
    for use in (store.read, store.remove, lambda kind, name: store.write(kind, name, {}, b"")):
        with pytest.raises(ValueError, match="is no"):
            use(kind, name)
    assert inside(store.folder) == before


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702])
def test_a_folder_that_others_can_write_to_is_refused(store: Store, mode: int):
    store.folder.chmod(mode)
    with pytest.raises(UsageError, match="others can write to cache folder .*; run chmod go-w on it"):
        Store(store.folder)
    store.folder.chmod(0o755)
    assert Store(store.folder).read("program", NAME) is not None


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o602])
def test_a_key_that_others_can_read_is_refused(store: Store, mode: int):
    (store.folder / "key").chmod(mode)
    with pytest.raises(UsageError, match="others can read or write .*key, .*; remove that folder"):
        Store(store.folder)


def test_a_key_that_is_no_key_is_refused(store: Store, tmp_path: Path):
    key = store.folder / "key"
    key.write_bytes(bytes(31))
    with pytest.raises(UsageError, match="has 31 bytes, not 32; remove"):
        Store(store.folder)
    key.rename(tmp_path / "elsewhere")
    for wrong in (lambda: key.symlink_to(tmp_path / "elsewhere"), lambda: os.mkfifo(key, 0o600), key.mkdir):
        wrong()
        with pytest.raises(UsageError, match="is no regular file"):
            Store(store.folder)
        key.rmdir() if key.is_dir() else key.unlink()


@as_root
@pytest.mark.parametrize("which", [".", "key"])
def test_what_belongs_to_another_user_is_refused(store: Store, which: str):
    os.chown(store.folder / which, 12345, -1)
    with pytest.raises(UsageError, match=f"belongs to user 12345, and user {os.geteuid()} would run code"):
        Store(store.folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="all of that belongs to root")
def test_a_folder_of_roots_is_refused():
    with pytest.raises(UsageError, match="belongs to user 0"):
        private_folder(Path("/usr"))


@as_root
def test_another_users_key_that_cannot_be_read_is_refused(open_folder: Path):
    (open_folder / "key").write_bytes(bytes(32))
    (open_folder / "key").chmod(0o600)
    code = f"os.setuid({NOBODY})\ntry: Store(Path(sys.argv[1]))\nexcept Exception as error: print(error)"
    (line,) = child(code, open_folder)
    assert "belongs to user 0" in line


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="is no folder; name another one"):
            Store(folder)


CROWD = """
import multiprocessing, traceback
from xdit_compile.cache.seal import key_of
context = multiprocessing.get_context("fork")
barrier = context.Barrier(4)
def work(rank):
    for turn in range(20):
        folder = Path(sys.argv[1]) / str(turn)
        barrier.wait()
        store = Store(folder, limit=None)
        for number in range(3):
            assert store.write("program", f"{number:016x}", {"by": rank}, bytes([rank]) * 3000)
            assert store.write("code", f"{rank:08x}{number:08x}", {}, bytes([rank]))
            entry = store.read("program", f"{number:016x}")
            assert entry is not None and entry.body == bytes([entry.about["by"]]) * 3000
        barrier.wait()
        assert len(store.entries()) == 3 + 12 and key_of(folder) == store._key
workers = [context.Process(target=work, args=(rank,)) for rank in range(4)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
print([worker.exitcode for worker in workers])
"""


def test_processes_that_start_together_share_one_key_and_one_folder(tmp_path: Path):
    assert child(CROWD, tmp_path) == ["[0, 0, 0, 0]"]
    for turn in range(20):
        assert len(inside(tmp_path / str(turn))) == 1 + 3 + 12


def test_a_full_disk_costs_one_warning_and_leaves_nothing_behind(store: Store):
    code = """
store = Store(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
print([store.write("code", f"{size:016x}", {}, bytes(size)) for size in (100, 20000, 100, 30000)])
print(store.read("program", sys.argv[2]) is not None)
"""
    warning, *lines = child(code, store.folder, NAME)
    assert lines == ["[True, False, False, False]", "True"]
    assert f"nothing more is kept in cache folder {store.folder}: [Errno 27] File too large" in warning
    assert inside(store.folder) == [f"code/{100:016x}", "key", f"program/{NAME}"]


def test_a_folder_that_cannot_be_written_to_is_read(open_folder: Path):
    code = f"""
if os.geteuid() == 0: os.setuid({NOBODY})
folder = Path(sys.argv[1]) / "cache"
assert Store(folder).write("program", sys.argv[2], {{}}, b"body")
(folder / "program" / sys.argv[3]).write_bytes(b"broken")
for path in (folder / "program", folder): path.chmod(0o500)
store = Store(folder)
print(store.read("program", sys.argv[2]).body, store.read("program", sys.argv[3]), store.read("program", sys.argv[3]))
print([store.write(kind, sys.argv[2], {{}}, b"other") for kind in ("program", "code", "program")])
print(len(store.prune(0)), len(store.listed()))
"""
    refused, unwritten, *lines = child(code, open_folder, NAME, OTHER)
    assert "is left out, but cannot be removed" in refused and "nothing more is kept" in unwritten
    assert lines == ["b'body' None None", "[False, False, False]", "0 2"]


def test_a_folder_that_cannot_be_made_costs_one_warning(open_folder: Path):
    code = f"""
if os.geteuid() == 0: os.setuid({NOBODY})
Path(sys.argv[1]).chmod(0o500)
for folder in (Path(sys.argv[1]), Path(sys.argv[1]) / "cache"):
    store = Store(folder)
    print(store.write("program", sys.argv[2], {{}}, b""), store.read("program", sys.argv[2]), store.verify())
"""
    lines = child(code, open_folder, NAME)
    assert sum("nothing more is kept" in line for line in lines) == 2
    assert [line for line in lines if "nothing" not in line] == ["False None []"] * 2
    assert inside(open_folder) == []


def test_a_folder_that_vanished_costs_one_warning(store: Store, caplog: pytest.LogCaptureFixture):
    shutil.rmtree(store.folder)
    assert store.read("program", NAME) is None and store.listed() == []
    assert [store.write("program", NAME, {}, b"") for _ in range(2)] == [False, False]
    assert len(caplog.records) == 1


def filled(folder: Path, limit: int | None = None, count: int = 4) -> Store:
    """A cache of entries of one size, numbered from that used longest ago."""
    store = Store(folder, limit)
    for number in range(count):
        assert store.write("program", f"{number:016x}", {}, bytes(1000))
        used = time.time() - 1000 + number
        os.utime(folder / "program" / f"{number:016x}", (used, used))
    return store


def numbers(store: Store) -> list[int]:
    """Which entries are left."""
    return [int(listed.name, 16) for listed in store.listed()]


def test_what_was_used_least_recently_goes_first(tmp_path: Path):
    store = filled(tmp_path)
    size = store.listed()[0].size
    assert store.read("program", f"{0:016x}") is not None
    removed = store.prune(2 * size)
    assert [int(listed.name, 16) for listed in removed] == [1, 2] and numbers(store) == [0, 3]
    assert store.prune(2 * size) == [] and numbers(store) == [0, 3]
    assert store.prune(2 * size - 1) != [] and numbers(store) == [0]
    assert len(store.clear()) == 1 and inside(tmp_path) == ["key"]


def test_what_cannot_be_removed_is_counted(tmp_path: Path):
    store = filled(tmp_path)
    size = store.listed()[0].size
    stuck = tmp_path / "program" / OTHER
    stuck.mkdir()
    os.utime(stuck, (0, 0))
    assert len(store.prune(stuck.stat().st_size + size)) == 3 and stuck.exists()


def test_writing_beyond_the_limit_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    size = filled(tmp_path / "one", count=1).listed()[0].size
    store = filled(tmp_path / "more", limit=3 * size, count=5)
    assert numbers(store) == [2, 3, 4]
    scans: list[int] = []
    scan: Callable = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: scans.append(1) or scan(path))
    for _ in range(5):
        assert store.write("program", f"{4:016x}", {}, bytes(1000))
    assert not scans
    assert store.write("program", f"{5:016x}", {}, bytes(1000))
    assert scans and numbers(store) == [3, 4, 5]


def test_what_is_larger_than_the_limit_drives_nothing_out(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    store = filled(tmp_path, limit=5000, count=2)
    assert not store.write("program", NAME, {}, bytes(6000)) and not store.write("program", NAME, {}, bytes(6000))
    assert numbers(store) == [0, 1] and len(caplog.records) == 1
    assert store.write("program", NAME, {}, bytes(100))


def test_drafts_of_processes_that_are_gone_are_removed(store: Store):
    old, young = (store.folder / "program" / f".draft-{age}" for age in ("old", "young"))
    for draft in (old, young):
        draft.touch()
    os.utime(old, (0, 0))
    store.prune(10**9)
    assert not old.exists() and young.exists()
    assert [listed.name for listed in store.listed()] == [NAME]


def test_what_is_kept_is_listed_and_checked(store: Store, caplog: pytest.LogCaptureFixture):
    assert store.write("code", OTHER, {"for": "code"}, b"")
    (store.folder / "program" / OTHER).write_bytes(b"broken")
    (store.folder / "program" / "notes.txt").touch()
    checked = [(listed.kind, listed.name, listed.about, sound) for listed, sound in store.verify()]
    assert checked == [
        ("code", OTHER, {"for": "code"}, True),
        ("program", NAME, ABOUT, True),
        ("program", OTHER, {}, False),
    ]
    assert [(listed.kind, listed.name) for listed in store.entries()] == [("code", OTHER), ("program", NAME)]
    assert all(abs(listed.used - time.time()) < 60 for listed in store.listed())
    assert store.remove("code", OTHER) and not store.remove("code", OTHER)
    assert len(store.clear()) == 2 and inside(store.folder) == ["key", "program/notes.txt"]
    assert not caplog.records


def test_the_key_is_made_once(tmp_path: Path):
    key = key_of(private_folder(tmp_path / "deep" / "cache"))
    assert key_of(tmp_path / "deep" / "cache") == key and len(set(key)) > 10
    assert key_of(private_folder(tmp_path / "other")) != key


def test_which_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    default = tmp_path / "xdit_compile"
    assert resolve("auto", {}) == resolve("auto", {"XDIT_COMPILE_CACHE": "auto"}) == default
    assert resolve("auto", {"XDIT_COMPILE_CACHE": "~/kept"}) == tmp_path / "home" / "kept"
    assert [resolve("auto", {"XDIT_COMPILE_CACHE": word}) for word in ("", "off")] == [None, None]
    assert [resolve(word, {"XDIT_COMPILE_CACHE": "/x"}) for word in (None, "", "off")] == [None] * 3
    assert resolve("here", {"XDIT_COMPILE_CACHE": "off"}) == resolve(Path("here"), {}) == tmp_path / "here"
    assert not default.exists()


def command(capsys: pytest.CaptureFixture[str], *arguments: object, exit_code: int = 0) -> str:
    """What a command of the cache prints; its one line on stderr where it fails."""
    assert main(["cache", *map(str, arguments)]) == exit_code
    printed = capsys.readouterr()
    return printed.err if exit_code == 2 else printed.out + printed.err


def test_the_commands_of_the_cache(store: Store, capsys: pytest.CaptureFixture[str]):
    folder = ["--cache_dir", store.folder]
    store.write("code", OTHER, {"for": "\x1b[1mcode"}, bytes(2000))
    table = command(capsys, "list", *folder)
    assert "denoiser [4, 8]" in table and NAME[:12] in table and "\x1b" not in table
    assert f"2 entries, 2.4 KiB in {store.folder}" in table
    shown = command(capsys, "show", "--cache-dir", store.folder, NAME[:3]).splitlines()
    assert shown[:2] == ["kind: program", f"name: {NAME}"]
    assert shown[4:] == ["about:", "  for: denoiser [4, 8]", "  made:", "    ranks: 0, 1", "    torch: 2.13"]
    assert "all sound" in command(capsys, "verify", *folder)
    assert "removed 1 entry" in command(capsys, "prune", *folder, "--limit", "2.1KiB")
    assert "1 entry, 2.1 KiB" in command(capsys, "list", *folder)
    assert "removed 1 entry, 2.1 KiB" in command(capsys, "clear", *folder)
    assert command(capsys, "list", *folder) == f"0 entries, 0 bytes in {store.folder}\n"


def test_the_commands_name_what_is_broken(store: Store, capsys: pytest.CaptureFixture[str]):
    folder = ["--cache_dir", store.folder]
    (store.folder / "program" / OTHER).write_bytes(b"broken")
    first, last = command(capsys, "verify", *folder, exit_code=1).splitlines()
    assert first == f"broken: program/{OTHER}" and "error: 1 of 2 entries broken" in last
    assert "and 1 broken" in command(capsys, "list", *folder)
    assert "is broken; clear removes it" in command(capsys, "show", *folder, OTHER, exit_code=1)
    assert "abc is the name of nothing" in command(capsys, "show", *folder, "abc", exit_code=2)
    store.write("code", NAME, {}, b"")
    assert "is how 2 begin: code/0123" in command(capsys, "show", *folder, NAME, exit_code=2)
    assert "no number of bytes" in command(capsys, "prune", *folder, "--limit", "much", exit_code=2)
    store.folder.chmod(0o777)
    for arguments in (["list"], ["show", NAME], ["verify"], ["prune", "--limit", "1"], ["clear"]):
        assert "others can write" in command(capsys, *arguments, *folder, exit_code=2)
    assert len(inside(store.folder)) == 4


def test_the_commands_make_no_cache(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / NAME).touch()
    monkeypatch.setenv("XDIT_COMPILE_CACHE", str(tmp_path))
    for arguments in (["list"], ["verify"], ["prune", "--limit", "0"], ["clear"]):
        assert "0 entries" in command(capsys, *arguments)
    assert "is the name of nothing" in command(capsys, "show", NAME, exit_code=2)
    assert inside(tmp_path) == [f"code/{NAME}"]
    monkeypatch.setenv("XDIT_COMPILE_CACHE", "off")
    assert "give its folder with --cache_dir" in command(capsys, "list", exit_code=2)


def test_the_commands_are_light(store: Store):
    code = """
from xdit_compile.cli.main import main
folder = ["--cache_dir", sys.argv[1]]
commands = (["--help"], ["list"], ["show", sys.argv[2]], ["verify"], ["prune", "--limit", "1"], ["clear"])
print([main(["cache", *arguments, *([] if "--help" in arguments else folder)]) for arguments in commands])
print(sorted({"torch", "diffusers", "numpy"} & set(sys.modules)))
"""
    assert child(code, store.folder, NAME)[-2:] == ["[0, 0, 0, 0, 0, 0]", "[]"]


def test_warnings_go_to_the_logger_of_the_package(store: Store, caplog: pytest.LogCaptureFixture):
    (store.folder / "program" / NAME).write_bytes(b"")
    assert store.read("program", NAME) is None and store.read("program", NAME) is None
    assert [(record.name, record.levelno) for record in caplog.records] == [("xdit_compile", logging.WARNING)]
