"""The folder that inductor keeps for all processes of a user: the one of ``TORCHINDUCTOR_CACHE_DIR``, which the command
line sets to one in the cache folder, or else one among temporary files under a name that everybody knows.

What it compiles of torch's headers, and what it finds out about the processor, lies there for the next process: worth
five seconds. Whoever else could write there would write code for this user, so it is used only where nobody can.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from unittest import mock

from xdit_compile.cache.seal import private_folder
from xdit_compile.errors import UsageError


def is_private(folder: Path) -> bool:
    """Whether only this user can write to a folder, which is made where there is none."""
    try:
        private_folder(folder)
    except (UsageError, OSError):
        return False
    return not folder.is_symlink()


@contextmanager
def headers_in(folder: Path | None) -> Iterator[None]:
    """Have inductor compile headers into its common folder, or meanwhile into another, where that is open to others.

    By itself inductor puts them among temporary files, whatever ``TORCHINDUCTOR_CACHE_DIR`` says.

    Args:
        folder: the other one; None for none, where nothing is kept: inductor then goes by its own rules.
    """
    from torch._inductor import codecache

    place = Path(codecache._HEADER_DIR)
    named = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    place = Path(named) / place.name if named else place
    here = str(place if folder is None or is_private(place.parent) else folder / "headers")
    with mock.patch.multiple(codecache, _HEADER_DIR=here, _HEADER_LOCK_DIR=f"{here}/locks"):
        yield


class VectorInstructions:
    """Finds out which vector instructions of the processor compiled code may use, while a module is being captured.

    Inductor compiles and loads a program for each kind of them, which takes as long as all kernels of a small block.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None

    def find_meanwhile(self) -> None:
        """Begin, unless that was done or the common folder is open to others: then it is found out when asked for."""
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list
        from torch._inductor.runtime.runtime_utils import cache_dir

        if self._thread is None and is_private(Path(cache_dir())):
            self._thread = threading.Thread(target=valid_vec_isa_list, daemon=True)
            self._thread.start()

    def wait(self) -> None:
        """Return when they are known, or nobody looks for them."""
        if self._thread is not None:
            self._thread.join()

    def all_work(self) -> bool:
        """Whether all that the processor has are known to work; returns when that is known, or nobody looks."""
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list

        if self._thread is None:
            return False
        self.wait()
        with _untried():
            return valid_vec_isa_list() == valid_vec_isa_list.__wrapped__()

    def take_all(self) -> None:
        """Take it from another process on this machine that all work."""
        from torch._inductor.cpu_vec_isa import valid_vec_isa_list

        if self._thread is None:
            with _untried():
                valid_vec_isa_list()


def _untried() -> AbstractContextManager[None]:
    from torch._inductor import config

    patched: AbstractContextManager[None] = config.patch({"cpp.vec_isa_ok": True})
    return patched
