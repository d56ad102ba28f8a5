"""One rank as the front sees it: a process, and the connection to it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection as pipes
from typing import Any

from xdit_compile.errors import XditCompileError

from .messages import Lost
from .starters import Child

LOOK_S = 0.2
"""So often it is seen whether a process has ended, beside its connection, which tells at once as a rule."""


class GangLost(XditCompileError):
    """A rank died, failed alone, or does not answer; all of them have to be started anew."""


@dataclasses.dataclass(eq=False)
class Member:
    """A rank.

    Args:
        rank: among all that the server has.
        child: where it runs; None where it was not started from here.
        connection: to it.
    """

    rank: int
    child: Child | None
    connection: pipes.Connection

    def send(self, message: Any) -> None:
        """Tell it something.

        Raises:
            GangLost: it is gone.
        """
        try:
            self.connection.send(message)
        except OSError as error:
            raise GangLost(self._said(str(error))) from error

    def received(self, kind: type) -> Any:
        """What it said, which is of a kind.

        Raises:
            GangLost: it is gone, or says that it cannot go on.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError) as error:
            time.sleep(LOOK_S)
            raise GangLost(self._said("it hung up")) from error
        if isinstance(message, Lost):
            raise GangLost(f"rank {message.rank}: {message.error}")
        if not isinstance(message, kind):
            raise GangLost(f"rank {self.rank} said something else: {type(message).__name__}")
        return message

    def refuse_gone(self) -> None:
        """See that it is there, while it has nothing to say.

        Raises:
            GangLost: it is not, or says that it cannot go on.
        """
        self.refuse_ended()
        if self.connection.poll():
            self.received(type(None))

    def refuse_ended(self) -> None:
        """See that its process runs.

        Raises:
            GangLost: it does not.
        """
        if self.child is not None and self.child.ended() is not None:
            raise GangLost(self._said("it ended"))

    def _said(self, otherwise: str) -> str:
        how = None if self.child is None else self.child.ended()
        return f"rank {self.rank}: {otherwise}" if how is None else f"rank {self.rank} {how}"


def answers(members: Sequence[Member], kind: type, in_time: Callable[[], bool], late: str) -> list[Any]:
    """One message of a kind from every member, in their order.

    Args:
        in_time: whether there is time left.
        late: what a member did not do in time.

    Raises:
        GangLost: one is gone, or says nothing in time.
    """
    waited_for: dict[Any, Member] = {member.connection: member for member in members}
    said: dict[int, Any] = {}
    while waited_for:
        for connection in pipes.wait(list(waited_for), LOOK_S):
            member = waited_for.pop(connection)
            said[member.rank] = member.received(kind)
        if waited_for and not in_time():
            silent = next(iter(waited_for.values()))
            raise GangLost(f"rank {silent.rank} {late} in time")
        for member in waited_for.values():
            member.refuse_ended()
    return [said[member.rank] for member in members]
