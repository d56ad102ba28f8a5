"""Programs that run op by op while other processes compile their structures; all ranks go on with these at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

from xdit_compile.backends.codes import Codes
from xdit_compile.backends.worker import Worker

from .compile_together import Company, Shares, Wanted, compile_together
from .progress import Progress

logger = logging.getLogger("xdit_compile")
AnyRank = Callable[[str, bool], bool]
"""Whether something holds on any rank."""


class Pending:
    """The structures of one call, on their way.

    Args:
        wanted: what its programs want.
        worker: compiles this rank's share; None where it has none.

    Attributes:
        done: whether programs run compiled code.
    """

    def __init__(self, wanted: Sequence[Wanted], worker: Worker | None, codes: Codes, company: Company, name: str):
        self._wanted, self._worker, self._codes, self._company, self._name = wanted, worker, codes, company, name
        self.done = False
        for one in wanted:
            one.sites.run_meanwhile()

    @classmethod
    def begin(
        cls, wanted: Sequence[Wanted], codes: Codes, company: Company, folder: Path, name: str, show: Progress
    ) -> Pending | None:  # fmt: skip
        """Have missing structures compiled, each by a process of one of the ranks that want it.

        Returns:
            None where all ranks have all of them, and programs run them.
        """
        shares = Shares.agreed(wanted, codes, company)
        if not any(shares.turns.values()):
            compile_together(shares, codes, company, show)
            return None
        mine = [(each, *shares.places[each]) for each in shares.turns[company.rank]]
        jobs = [(one.sites.structure(job.target), job.forms, each) for each, one, job in mine]
        worker = Worker(jobs, codes.options, folder) if jobs else None
        return cls(wanted, worker, codes, company, name)

    def stop(self) -> None:
        """Let go of what is on its way; programs stay as they are."""
        if self._worker is not None:
            self._worker.stop()

    def advance(self, any_rank: AnyRank) -> bool:
        """Go on with compiled code, once the processes of all ranks have ended; whether that is so now."""
        if any_rank("graphs made in the background", self._worker is not None and not self._worker.done):
            return False
        if self._worker is not None:
            if self._worker.failure:
                logger.warning("graphs of %s were not compiled in the background: %s", self._name, self._worker.failure)
            self._worker.stop()
        shares = Shares.agreed(self._wanted, self._codes, self._company)
        compile_together(shares, self._codes, self._company, Progress(self._name))
        for one in self._wanted:
            one.sites.meanwhile = None
        self.done = True
        return True
