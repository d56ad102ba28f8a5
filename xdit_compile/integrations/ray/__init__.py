"""Gangs of ranks as actors of Ray: for a script of one's own, and behind an HTTP service of Ray Serve.

Raises:
    UsageError: on import, where Ray is not here or too old.
"""

from .needed import check_ray

check_ray()


from .app import build  # noqa: E402
from .ranks import Ranks  # noqa: E402

__all__ = ["Ranks", "build"]
