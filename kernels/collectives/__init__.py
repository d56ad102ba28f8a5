"""Collectives as single ops with uneven sizes: what a rewritten graph calls, eagerly or compiled.

Each names its process group; the empty name means this rank alone, for which every one is a copy. Importing this
package registers them.
"""

from __future__ import annotations

from . import all_gather, all_reduce, all_to_all, halo, reduce_scatter

__all__ = ["all_gather", "all_reduce", "all_to_all", "halo", "reduce_scatter"]
