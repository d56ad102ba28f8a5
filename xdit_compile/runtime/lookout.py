"""Frees this rank from a wait that no call of its own can end.

With gloo a rank waits for a transfer in the transfer's own call, looks about now and then, and is told there that a
peer is gone. With NCCL that call puts the transfer in the device's queue and comes back at once. The thread waits
later, for the device (a value is read, the device is synchronized), where it can look at nothing, and where a transfer
that does not come has it wait until NCCL's watchdog ends the process. So another thread looks about meanwhile, and
aborts the communicators where that is in vain, which ends what is in the queue. The first one then goes on, with what
was computed of transfers that never came, and is stopped at its next transfer, or before its request returns.
"""

from __future__ import annotations

import threading

import torch.distributed as dist

from xdit_compile.distributed.agreement import Agreement
from xdit_compile.distributed.peers import Peers
from xdit_compile.errors import AgreementError
from xdit_compile.kernels.collectives.communicators import logger
from xdit_compile.kernels.collectives.process_groups import Groups


class Lookout:
    """Looks after one rank's requests, where its groups need it.

    Args:
        agreement: knows what the other ranks say.
        groups: which are given up where waiting is in vain.
    """

    def __init__(self, agreement: Agreement, groups: Groups):
        self._agreement, self._groups = agreement, groups
        self._lock = threading.Lock()
        self._look: _Look | None = None

    def begin(self) -> None:
        """From now on this thread may wait for the device."""
        if self._groups.come_at_once and not self._agreement.alone:
            with self._lock:
                self._look = _Look(self._agreement, self._groups)
            self._agreement.watch(self._step)

    def end(self) -> None:
        """It does so no more; nothing is given up after this."""
        if self._look is not None:
            self._agreement.watch(None)
            with self._lock:
                self._look = None

    def _step(self, store: dist.Store | None) -> None:
        """Look about. An abort takes a thread of its own: signs of life must not stop meanwhile."""
        look = self._look
        error = None if look is None else look.found(store)
        if error is not None:
            threading.Thread(target=self._give_up, args=(look, error), daemon=True).start()

    def _give_up(self, look: _Look, error: AgreementError) -> None:
        with self._lock:
            if self._look is look:
                logger.warning("rank %d waits in vain, and ends its transfers: %s", self._agreement.rank, error)
                self._groups.give_up(error)


class _Look:
    """What the other thread sees during one request."""

    def __init__(self, agreement: Agreement, groups: Groups):
        self._agreement, self._groups = agreement, groups
        self._peers: Peers | None = None
        self._at: tuple[int, str] | None = None
        self._over = False

    def found(self, store: dist.Store | None) -> AgreementError | None:
        """Why waiting is in vain, once it is."""
        error = None if self._over else self._found(store)
        self._over = self._over or error is not None
        return error

    def _found(self, store: dist.Store | None) -> AgreementError | None:
        if store is None:
            return AgreementError("the store of the process group does not answer; start all processes again")
        if self._peers is None:
            self._peers = self._agreement.through(store)
        event, before = self._agreement.at, self._at
        self._at = event
        try:
            self._agreement.refuse_vain(self._peers, still=event == before)
        except AgreementError as error:
            return error
        return self._groups.failure()
