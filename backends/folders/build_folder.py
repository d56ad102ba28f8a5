"""Where compilers put the files that they make, and read them from: a folder of this process's own."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.util import Finalize
from pathlib import Path

from xdit_compile.distributed.environment import RUN_FOLDER

VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR")
"""What inductor, triton and the compilers that they call are told their folders by, whenever they look."""


class BuildFolder:
    """A folder that only this user can enter, made when it is first wanted and gone when the process ends.

    Inductor's own folder has a name that everybody knows, and takes what lies there for what it made itself. It is
    left to those who keep nothing of ours. This one outlives whoever wanted it, as a library that a process has loaded
    is taken again by whatever else names it there, and is read where it lies. Processes that Python's multiprocessing
    started remove theirs, too, which end without what ``atexit`` was told. A command that starts processes has them put
    theirs into one of its own, which it removes whatever has become of them.
    """

    def __init__(self) -> None:
        self._path: Path | None = None

    def share(self, path: Path) -> None:
        """Use the folder of another process of this user, and leave it to that process."""
        self._path = path

    @property
    def path(self) -> Path:
        """The folder."""
        if self._path is None:
            self._path = Path(tempfile.mkdtemp(prefix="xdit_compile-", dir=os.environ.get(RUN_FOLDER)))
            Finalize(None, shutil.rmtree, (self._path,), {"ignore_errors": True}, exitpriority=0)
        return self._path

    @contextmanager
    def current(self) -> Iterator[Path]:
        """Have compilers use the folder meanwhile."""
        before = {name: os.environ.get(name) for name in VARIABLES}
        folders = {name: self.path / name.partition("_")[0].lower() for name in VARIABLES}
        folders["TMPDIR"].mkdir(exist_ok=True)
        os.environ.update({name: str(folder) for name, folder in folders.items()})
        try:
            yield self.path
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
