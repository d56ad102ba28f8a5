"""Keeps calls that were compiled for other processes, and finds those that others made: the same on all ranks."""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from xdit_compile.backends.codes import CodeFiles, Codes
from xdit_compile.backends.target.pretend_card import DEVICE
from xdit_compile.cache.environment import environment, environment_of_target, target_of
from xdit_compile.cache.sources import fits, own_sources
from xdit_compile.cache.store import Store
from xdit_compile.cache.unportable import Unportable
from xdit_compile.cache.values import digest_of
from xdit_compile.distributed.agreement import Agreement
from xdit_compile.errors import one_line

from .compile_together import Company
from .stored_call import StoredCall

KIND = "program"
MOST_VALUES = 8
"""So many calls are kept that differ in nothing but values that the capture bakes in."""
logger = logging.getLogger("xdit_compile")


@dataclasses.dataclass(frozen=True)
class Ticket:
    """What a call is kept under on this rank.

    Args:
        keys: digests of all that decides what the rank runs for it, but for values that the capture bakes in: that of
            entries that are made here, and after it that of those which other machines make for cards such as this one.
        about: what it is for, in words of JSON.
    """

    keys: tuple[str, ...]
    about: dict[str, Any]

    @property
    def names(self) -> list[list[str]]:
        """For each key the places of calls that differ in such values."""
        return [[digest_of([key, place]) for place in range(MOST_VALUES)] for key in self.keys]


class Shelf:
    """The cache as one rank of a session sees it.

    An entry is used where every rank has the one of the same making: what one rank finds alone would meet programs of
    another making in its first exchange.

    Args:
        store: where entries are; None where nothing is kept.
        agreement: the talk among all ranks.
        codes: compiles structures, where the backend does.
        making: what entries have in common with those that are made for other ranks in their absence.
    """

    def __init__(self, store: Store | None, agreement: Agreement, codes: Codes | None, making: str | None = None):
        self._store, self._agreement, self._codes = store, agreement, codes
        self._making = making
        self._company: Company | None = None
        self._sources: str | None = None
        if codes is not None and store is not None:
            codes.store = CodeFiles(store)

    def ticket(self, describe: Callable[[], Any], about: dict[str, Any], device: torch.device) -> Ticket | None:
        """What a call is kept under; None where nothing is kept, or something of it cannot be described.

        Args:
            describe: says in values of JSON what decides on the programs.
        """
        if self._store is None:
            return None
        try:
            described, around = describe(), self._environments(device)
            if self._codes is not None:
                self._codes.environment = around[0]
            return Ticket(tuple(digest_of([each, described]) for each in around), about)
        except Exception as error:  # whatever code of somebody else's does when it is looked at
            _say_why(error)
        return None

    def _environments(self, device: torch.device) -> list[str]:
        """Digests of what surrounds entries that are made here, and those that are made for such a card elsewhere."""
        if self._codes is not None and self._codes.card is not None:
            around = [environment_of_target(self._codes.card.target)]
        else:
            target = target_of(device)
            around = [environment(device), *([] if target is None else [environment_of_target(target)])]
        return [digest_of({"environment": each, "own sources": self._own_sources()}) for each in around]

    @property
    def kind(self) -> str | None:
        """The kind of device that is compiled for where it is not there, and all lies on the host; None elsewhere."""
        return None if self._codes is None or self._codes.card is None else DEVICE.type

    def find(self, ticket: Ticket | None, leaves: Sequence[Any], device: torch.device) -> StoredCall | None:
        """What is kept under a ticket for a call's flat inputs, if every rank has an entry of the same making."""
        stored = None if ticket is None else self._place(ticket, leaves, device)[1]
        mine = None if stored is None else [stored.making, stored.verified, stored.compared]
        said = [mine, *self._agreement.exchange("a call that was kept", mine).values()]
        if stored is None or not all(each is not None and each[0] == stored.making for each in said):
            return None
        verified, compared = (all(each[at] for each in said) for at in (1, 2))
        return dataclasses.replace(stored, verified=verified, compared=compared)

    def _place(
        self, ticket: Ticket, leaves: Sequence[Any], device: torch.device
    ) -> tuple[str, StoredCall | None]:  # fmt: skip
        """What is kept under a ticket for a call's flat inputs, and under which name; or the name where it can be."""
        assert self._store is not None
        free, places = list[str](), ticket.names
        for names in places:
            for name in names:
                entry = self._store.read(KIND, name)
                stored = None if entry is None else self._unpacked(entry.body, device)
                if stored is not None and stored.fits(leaves):
                    return name, stored
                free += [name] if stored is None and name in places[0] else []
                if entry is None:
                    break
        return (free or places[0])[0], None

    def _unpacked(self, body: bytes, device: torch.device) -> StoredCall | None:
        try:
            stored = StoredCall.unpacked(body, device)
        except Exception as error:  # what it speaks of may have changed in any way
            logger.warning("an entry of the cache is not used: %s: %s", type(error).__name__, one_line(error))
            return None
        if (changed := fits(stored.sources)) is not None:
            logger.info("an entry of the cache is not used: %s", changed)
            return None
        return stored

    def keep(self, ticket: Ticket | None, leaves: Sequence[Any], device: torch.device, stored: StoredCall) -> None:
        """Keep a call under its ticket, in the place of one that was made for the same values or fits no more."""
        if ticket is not None and self._store is not None:
            self._write(ticket, self._place(ticket, leaves, device)[0], stored)

    def compared(self, ticket: Ticket | None, leaves: Sequence[Any], device: torch.device) -> None:
        """Note of a call that a later one was compared with the module, too."""
        if ticket is not None:
            name, stored = self._place(ticket, leaves, device)
            if stored is not None and not stored.compared:
                self._write(ticket, name, dataclasses.replace(stored, compared=True))

    def drop(self, ticket: Ticket | None, leaves: Sequence[Any], device: torch.device) -> None:
        """Keep a call no more."""
        if ticket is not None and self._store is not None:
            self._store.remove(KIND, self._place(ticket, leaves, device)[0])

    def _write(self, ticket: Ticket, name: str, stored: StoredCall) -> None:
        assert self._store is not None
        try:
            body = stored.packed(self.kind)
        except Exception as error:  # as in `ticket`
            _say_why(error)
        else:
            self._store.write(KIND, name, {**ticket.about, "verified": stored.verified}, body)

    def making(self) -> str:
        """What all entries that are made now have in common."""
        return self._making or self._agreement.share(uuid.uuid4().bytes).hex()

    def expect(self, device: torch.device) -> None:
        """Have the first rank find out about the machine, while all capture what is to be compiled for a device."""
        if self._codes is not None and device.type == "cpu" and (self._agreement.alone or self._agreement.rank == 0):
            self._codes.instructions.find_meanwhile()

    def company(self) -> Company:
        """Who takes compiled code from whom; all ranks call this at once.

        Ranks that have a folder in common compile in one folder, too, and what inductor finds out about the machine is
        found out by one of them.
        """
        if self._company is None:
            store, codes = self._store, self._codes
            place = None if store is None or codes is None else _identity(store.folder)
            mine = (
                None
                if place is None or codes is None
                else [place, str(codes.folder.path), codes.instructions.all_work()]
            )
            said = {self._agreement.rank: mine, **self._agreement.exchange("a folder for code", mine)}
            if codes is None or mine is None or any(each is None for each in said.values()):
                self._company = Company()
            else:
                alike = [rank for rank, each in sorted(said.items()) if each[0] == place]
                _, folder, all_work = said[alike[0]]
                codes.folder.share(Path(folder))
                if all_work:
                    codes.instructions.take_all()
                apart = len(alike) < len(said)
                self._company = Company(self._agreement.rank, self._agreement.exchange, apart, not apart)
        return self._company

    @property
    def folder(self) -> Path | None:
        """Where entries are."""
        return None if self._store is None else self._store.folder

    def _own_sources(self) -> str:
        if self._sources is None:
            self._sources = own_sources()
        return self._sources


def _say_why(error: Exception) -> None:
    """Say why something is not kept: what cannot be described is to be expected, anything else is not."""
    if isinstance(error, Unportable):
        logger.info("not kept for other processes: %s", error)
    else:
        logger.warning("not kept for other processes: %s: %s", type(error).__name__, one_line(error))


def _identity(folder: Path) -> list[Any]:
    """What tells a folder from every other one, on this machine and elsewhere."""
    found = os.stat(folder)
    return [socket.gethostname(), str(folder), found.st_dev, found.st_ino]
