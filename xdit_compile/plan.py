"""What the user asks for: degrees of each parallelism and the choices that go with them."""

from __future__ import annotations

import dataclasses
import math

from .errors import PlanError

BACKENDS = ("auto", "inductor", "nexfort", "eager")
ATTENTIONS = ("auto", "sdpa", "sdpa_math", "sdpa_flash", "sdpa_efficient", "sdpa_cudnn", "flash_attn", "yunchang")
FALLBACKS = ("gather", "error")


@dataclasses.dataclass(frozen=True)
class Plan:
    """How a pipeline is spread over devices.

    Args:
        ulysses: ranks that exchange tokens for heads around each attention (DeepSpeed-Ulysses, arXiv:2309.14509).
        ring: ranks around which keys and values travel (Ring Attention, arXiv:2310.01889). ``ulysses * ring`` ranks
            split the tokens together (USP, arXiv:2405.07719).
        backend: what runs the rewritten graphs: ``inductor``, ``nexfort`` or ``eager``; ``auto`` takes ``inductor``
            where it can be used and ``eager`` elsewhere.
        attention: which kernel computes attention; ``auto`` takes the best that is available.
        fallback: ``gather`` runs what cannot be split on gathered tensors and reports it, ``error`` refuses.
        verify: compare the first call of every new graph with the unsplit module.
        timeout_s: seconds that any rank waits for another before it gives up.
    """

    ulysses: int = 1
    ring: int = 1
    backend: str = "auto"
    attention: str = "auto"
    fallback: str = "gather"
    verify: bool = True
    timeout_s: float = 600.0

    @property
    def sequence(self) -> int:
        """Ranks that share the tokens."""
        return self.ulysses * self.ring

    @property
    def world_size(self) -> int:
        """Ranks that the plan needs in all."""
        return self.sequence

    def problems(self, world_size: int | None = None) -> list[str]:
        """Every reason why this plan cannot run, each as one clause that says what to change."""
        found = []
        for name in ("ulysses", "ring"):
            degree = getattr(self, name)
            if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
                found.append(f"{name}={degree!r} must be a whole number of at least 1")
        for name, allowed in (("backend", BACKENDS), ("attention", ATTENTIONS), ("fallback", FALLBACKS)):
            if getattr(self, name) not in allowed:
                found.append(f"{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(allowed)}")
        if not isinstance(self.verify, bool):
            found.append(f"verify={self.verify!r} must be True or False")
        if not isinstance(self.timeout_s, int | float) or not math.isfinite(self.timeout_s) or self.timeout_s <= 0:
            found.append(f"timeout_s={self.timeout_s!r} must be a positive number of seconds")
        if not found and world_size is not None and self.world_size != world_size:
            found.append(
                f"ulysses={self.ulysses} x ring={self.ring} needs {self.world_size} processes "
                f"but {world_size} are running; start {self.world_size} or change the degrees"
            )
        return found

    def check(self, world_size: int | None = None) -> Plan:
        """Return the plan itself.

        Raises:
            PlanError: naming every problem at once.
        """
        found = self.problems(world_size)
        if found:
            raise PlanError("; ".join(found))
        return self
