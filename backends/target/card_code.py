"""What Triton compiled for a card, taken to other machines: machine code by Triton's own keys, launch configurations.

Triton finds a kernel by a digest of its source, its options and itself. Where all of that is the same on the machine
with the card, what lies in Triton's folder under the digest is used; where it is not, Triton compiles there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .cards import Card
from .pretend_card import Configuration, check_versions, configured, pretend_card

logger = logging.getLogger("xdit_compile")
TRITON_FOLDER = "triton"
"""Where in a build folder Triton has its files."""
WANTED = (".cubin", ".json")
"""How files end that are taken along: machine code, and how it is launched."""
GROUP = "__grp__"
"""How the file begins that says where the others of a kernel are."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The files of one kernel by their names, and their digest."""

    files: Mapping[str, bytes]
    digest: str

    @classmethod
    def read(cls, folder: Path) -> Kernel:
        """What Triton left in a folder."""
        paths = [path for path in sorted(folder.iterdir()) if path.suffix in WANTED and path.name[:7] != GROUP]
        files = {path.name: path.read_bytes() for path in paths}
        return cls(files, _digest(files))

    @property
    def whole(self) -> bool:
        """Whether the files are those that were read."""
        return _digest(self.files) == self.digest

    def write(self, folder: Path) -> None:
        """Put the files where Triton looks for them, unless something is there."""
        if folder.exists():
            return
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        about = next(name for name in self.files if name.endswith(".json"))
        group = {"child_paths": {name: str(folder / name) for name in self.files}}
        (folder / f"{GROUP}{about}").write_text(json.dumps(group))


@dataclasses.dataclass
class CardCode:
    """What belongs to the code of one structure for a card.

    Args:
        target: the architecture.
        kernels: by Triton's keys, as it names its folders.
        chosen: the launch configurations of kernels that inductor would have tried several of, by their names.
    """

    target: str
    kernels: dict[str, Kernel] = dataclasses.field(default_factory=dict)
    chosen: dict[str, Configuration] = dataclasses.field(default_factory=dict)


@contextlib.contextmanager
def compiling_for(card: Card) -> Iterator[CardCode]:
    """Have inductor compile for a card that is not there; what Triton makes of it is in what is yielded, at the end.

    Raises:
        UsageError: torch or Triton is of a version that is not known.
    """
    code, folders = CardCode(card.target), set[Path]()
    with pretend_card(card), configured(code.chosen), noting_kernels(lambda folder, known: folders.add(folder)):
        yield code
        code.kernels.update({folder.name: Kernel.read(folder) for folder in sorted(folders)})


@contextlib.contextmanager
def loading(code: CardCode, folder: Path) -> Iterator[None]:
    """Have Triton find the machine code of a structure that is loaded meanwhile; what it does not find it compiles.

    Args:
        folder: the build folder, in which files are put.
    """
    from torch._inductor import config

    check_versions()
    for name, kernel in code.kernels.items():
        if kernel.whole:
            kernel.write(folder / TRITON_FOLDER / name)
    looked = dict[str, bool]()
    with (
        configured(dict(code.chosen)),
        config.patch(compile_threads=1),
        noting_kernels(lambda folder, known: looked.setdefault(folder.name, known)),
    ):
        yield
    made = len(looked) - sum(looked.values())
    if made:
        logger.info(
            "%d of %d kernels were compiled here, as what was built for %s does not fit: it is not whole, or Triton "
            "is another one", made, len(looked), code.target,
        )  # fmt: skip


@contextlib.contextmanager
def noting_kernels(note: Callable[[Path, bool], Any]) -> Iterator[None]:
    """Have a function told of every kernel that Triton compiles or finds: its folder, and whether it was there."""
    from triton import knobs

    def told(*, metadata_group: Mapping[str, str], cache_hit: bool, **rest: Any) -> None:
        note(Path(next(iter(metadata_group.values()))).parent, cache_hit)

    with knobs.compilation.scope():
        knobs.compilation.listener = told
        yield


def _digest(files: Mapping[str, bytes]) -> str:
    state = hashlib.sha256()
    for name, content in sorted(files.items()):
        state.update(f"{name} {len(content)}\n".encode() + content)
    return state.hexdigest()
