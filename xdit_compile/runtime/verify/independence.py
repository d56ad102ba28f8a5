"""Tests whether the samples of a call are independent of one another, so that it may be cut into calls of fewer."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from xdit_compile.capture.capture import first_line, relative_difference
from xdit_compile.capture.cutting import Call, Cut, Made, Path, Pieces, joined, pieces_of, ways_to_cut
from xdit_compile.capture.state.module_snapshot import preserved, same_random_numbers
from xdit_compile.ir.precision import full_precision
from xdit_compile.ir.results import Template, tensors_of

from .verification import TOLERANCE

STAYS = 0.1
"""How much of what rounding may do to a result another sample's values may do to it: kernels may pad otherwise."""
FADED = 0.25


@dataclasses.dataclass(frozen=True)
class Independent:
    """A call whose samples were seen to be independent.

    Args:
        cut: into which parts it falls.
        pieces: where each tensor of its result is in the results of the parts.
        likes: for every part tensors of the shapes and dtypes of its results, on the meta device.
    """

    cut: Cut
    pieces: Sequence[Pieces]
    likes: Sequence[Sequence[torch.Tensor]]


@dataclasses.dataclass(frozen=True)
class Bound:
    """A call that is not to be cut.

    Args:
        why: the end of a sentence that begins with the name of the module.
        samples: how many it seems to be of.
    """

    why: str
    samples: int = 1


class _Tied(Exception):
    """Why a way to cut is none; with the inputs that tie samples, where these are known."""

    def __init__(self, why: str, entries: frozenset[Path] = frozenset()):
        super().__init__(why)
        self.entries = entries


@torch.no_grad()
def independent(
    module: nn.Module, forward: Callable[..., Any], args: tuple, kwargs: dict, parts: Sequence[int],
    counts: Sequence[int],
) -> Independent | Bound:  # fmt: skip
    """How a call falls into as many parts as one of ``parts``, tried in turn.

    Parts must give what the whole does, and each part of the result must stay when the inputs of the others change: in
    their values a little, and so that all of them are alike, which sends them all one way where a module sorts them.

    Args:
        counts: how many samples the call may be of; see `counts_of`.
    """
    likely = [count for count in counts if any(ways_to_cut((args, kwargs), count, 1))] or [1]
    if max(likely) < min(parts):
        return Bound(few(likely[0], min(parts)), likely[0])
    with same_random_numbers(), preserved(module), full_precision():
        trial = _Trial(forward, (args, kwargs))
        try:
            whole = trial.made((args, kwargs))
        except Exception as error:  # noqa: BLE001 - any refusal of the module's own code
            return Bound(f"cannot be called twice: {first_line(error)}", likely[0])
        return _found(trial, whole, parts, likely)


def _found(trial: _Trial, whole: Made, parts: Sequence[int], counts: Sequence[int]) -> Independent | Bound:
    why = ""
    for samples in counts:
        for count in parts:
            if samples < count:
                why = why or few(samples, count)
                continue
            for cut in ways_to_cut(trial.call, samples, count):
                try:
                    return trial.tested(cut, whole)
                except _Tied as tied:
                    why = why or str(tied)
    return Bound(why, counts[0])


def few(samples: int, ranks: int) -> str:
    """What to say of a call with fewer samples than ranks."""
    return f"is called with {samples} sample{'s' * (samples != 1)} at once, fewer than the {ranks} ranks"


def made(forward: Callable[..., Any], call: Call) -> tuple[Template, list[torch.Tensor]]:
    """The result of a call, taken apart; the module may write to its inputs."""
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, call)
    with torch.no_grad():
        result = forward(*args, **kwargs)
    return Template.of(result), tensors_of(result)


class _NotTried(_Tied):
    """The module does not take the other values of a trial."""


class _Trial:
    """Runs of one call, of its parts, and of it with other values.

    Args:
        forward: what is called.
        call: its inputs.
        leaves_choices: whether single whole numbers stay as they are.
    """

    def __init__(self, forward: Callable[..., Any], call: Call, leaves_choices: bool = False):
        self._forward, self.call, self._leaves_choices = forward, call, leaves_choices

    def made(self, call: Call) -> tuple[Template, list[torch.Tensor]]:
        """The result of a call, taken apart."""
        return made(self._forward, call)

    def tested(self, cut: Cut, whole: Made) -> Independent:
        """A way to cut that passed every test; without inputs that are not by sample, where it fails with them.

        A number that chooses, such as a style, may have no other value that the module takes: it stays then.

        Raises:
            _Tied: it did not pass.
        """
        try:
            return self._tested(cut, whole)
        except _NotTried:
            if self._leaves_choices:
                raise
            return _Trial(self._forward, self.call, leaves_choices=True).tested(cut, whole)
        except _Tied as tied:
            fewer = [cut.entries - tied.entries] if tied.entries else [cut.entries - {one} for one in cut.entries]
            for entries in fewer:
                with contextlib.suppress(_Tied):
                    if entries:
                        return self._tested(dataclasses.replace(cut, entries=entries), whole)
            raise

    def _tested(self, cut: Cut, whole: Made) -> Independent:
        try:
            parts = [self.made(cut.part(self.call, at)) for at in range(cut.parts)]
        except Exception as error:  # noqa: BLE001 - any refusal of the module's own code
            raise _Tied(f"cannot be called with fewer samples at once: {first_line(error)}") from error
        pieces = pieces_of(whole, parts, cut)
        if pieces is None:
            raise _Tied("returns nothing that goes by sample")
        self._refuse_influence(cut, whole, pieces)
        if not alike(joined(pieces, [tensors for _, tensors in parts]), whole[1], 1.0):
            raise _Tied("gives other results for fewer samples at once")
        return Independent(cut, pieces, [[tensor.to("meta") for tensor in tensors] for _, tensors in parts])

    def _refuse_influence(self, cut: Cut, whole: Made, pieces: Sequence[Pieces]) -> None:
        for kept in _sides(cut):
            levelled = self._with(cut, self.call, kept, _levelled_or_halved, inside=True)
            trials = [(self.call, whole[1], _faded), (self.call, whole[1], _levelled)]
            for call, expected, change in [*trials, (levelled, self._other(levelled), _levelled)]:
                if not self._stays(cut, call, expected, pieces, kept, change):
                    each = [dataclasses.replace(cut, entries=frozenset([entry])) for entry in cut.entries]
                    tying = [one for one in each if not self._stays(one, call, expected, pieces, kept, change)]
                    entries = frozenset(entry for one in tying for entry in one.entries)
                    why = f"mixes its samples: one's result changes with another's {_named(entries)}"
                    raise _Tied(why, entries)

    def _with(self, cut: Cut, call: Call, kept: frozenset[int], change: Any, inside: bool = False) -> Call:
        """The call with other values for the samples that are not kept, or for those alone."""
        how = _but_choices(change) if self._leaves_choices else change
        return cut.mapped(call, lambda value: _each(value, kept, how, inside))

    def _other(self, call: Call) -> Sequence[torch.Tensor]:
        """The result of the call with other values."""
        try:
            return self.made(call)[1]
        except Exception as error:  # noqa: BLE001 - any refusal of the module's own code
            raise _NotTried(f"cannot be tried with other inputs: {first_line(error)}") from error

    def _stays(
        self, cut: Cut, call: Call, expected: Sequence[torch.Tensor], pieces: Sequence[Pieces],
        kept: frozenset[int], change: Any,
    ) -> bool:  # fmt: skip
        """Whether the results of some samples stay when what the others are given changes."""
        results = self._other(self._with(cut, call, kept, change))
        if [each.shape for each in results] != [each.shape for each in expected]:
            return False
        mine = list(_own(pieces, cut, kept))
        return alike([results[k][rows] for k, rows in mine], [expected[k][rows] for k, rows in mine], STAYS)


def _sides(cut: Cut) -> Iterator[frozenset[int]]:
    """Samples of some parts, so that of every two parts each is once among them without the other."""
    for bit in range((cut.parts - 1).bit_length()):
        for side in (0, 1):
            spans = [cut.span(part) for part in range(cut.parts) if part >> bit & 1 == side]
            yield frozenset(sample for span in spans for sample in range(*span))


def _own(pieces: Sequence[Pieces], cut: Cut, kept: frozenset[int]) -> Iterator[tuple[int, Any]]:
    """The tensors of the result that some samples give, and which rows of each."""
    for k, each in enumerate(pieces):
        if len(each) > 1:
            yield k, sorted(kept)
        elif cut.span(each[0][0])[0] in kept:
            yield k, slice(None)


def alike(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], share: float = 1.0) -> bool:
    """Whether results differ by no more than a share of what rounding may do."""
    pairs = zip(found, expected, strict=True)
    return all(
        relative_difference(one, other) <= share * TOLERANCE.get(other.dtype, 0.0)
        and (not other.numel() or bool(other.isfinite().any()))
        for one, other in pairs
    )


def _named(entries: frozenset[Path]) -> str:
    """Inputs as the caller names them."""
    names = sorted({str(entry[1]) if entry[0] else f"argument {entry[1]}" for entry in entries})
    return "input " + " and ".join(names) if names else "several inputs together"


# ---- other values for the samples outside of one part


def _each(value: Any, kept: frozenset[int], change: Callable[..., Any], inside: bool) -> Any:
    """A tensor with other rows, or a list with other entries, outside of those that are kept, or inside."""
    leading = value[min(kept)]
    rows = [_changed(value[at], leading, change) if (at in kept) == inside else value[at] for at in range(len(value))]
    return torch.stack(rows) if isinstance(value, torch.Tensor) else type(value)(rows)


def _changed(entry: Any, leading: Any, change: Callable[..., Any]) -> Any:
    """An entry with other tensors; ``leading`` is one of those that stay."""
    leaves, spec = pytree.tree_flatten(entry)
    others, _ = pytree.tree_flatten(leading)
    pairs = zip(leaves, others if len(others) == len(leaves) else leaves, strict=True)
    changed = [change(one, other) if isinstance(one, torch.Tensor) else one for one, other in pairs]
    return pytree.tree_unflatten(changed, spec)


def _faded(row: torch.Tensor, leading: Any) -> torch.Tensor:
    """A sample's values nearer to zero, each by another part, zeros a little above it."""
    if not _measures(row):
        return _another(row, leading)
    drawn = torch.rand(row.shape, device=row.device, dtype=torch.float32)
    return torch.where(row == 0, 0.1 * drawn, row * (1 - FADED * drawn)).to(row.dtype)


def _levelled(row: torch.Tensor, leading: Any) -> torch.Tensor:
    """A sample of one value, the mean of one that stays."""
    if not _measures(row):
        return _another(row, leading)
    same = isinstance(leading, torch.Tensor) and leading.dtype == row.dtype
    return (leading if same else row).mean().expand(row.shape).clone() if row.dim() else row * (1 - FADED)


def _levelled_or_halved(row: torch.Tensor, leading: Any) -> torch.Tensor:
    """A sample of one value with half a mask: what sorts by values or pads to the longest shows there."""
    return _levelled(row, leading) if _measures(row) and row.dim() else _halved(row)


def _but_choices(change: Callable[..., Any]) -> Callable[..., Any]:
    """The same change, which leaves single whole numbers as they are."""

    def changed(row: torch.Tensor, leading: Any) -> torch.Tensor:
        is_choice = row.numel() == 1 and not (row.is_floating_point() or row.is_complex())
        return row if is_choice else change(row, leading)

    return changed


def _measures(row: torch.Tensor) -> bool:
    """Whether values are measured, not counted or chosen: a mask may be of numbers, too."""
    return (row.is_floating_point() or row.is_complex()) and not _is_mask(row)


def _is_mask(row: torch.Tensor) -> bool:
    return bool(((row == 0) | (row == 1)).all())


def _another(row: torch.Tensor, leading: Any) -> torch.Tensor:
    """Other indices, or another mask: those of another sample, or the nearest."""
    fits = isinstance(leading, torch.Tensor) and leading.shape == row.shape and leading.dtype == row.dtype
    if fits and not torch.equal(leading, row):
        return leading.clone()
    if _is_mask(row):
        return _shorter(row)
    return torch.where(row > 0, row - 1, row + 1)


def _shorter(mask: torch.Tensor) -> torch.Tensor:
    """A mask without its last entry, or with another one where it has only one or none."""
    flat = mask.reshape(-1).clone()
    chosen, left_out = flat.nonzero(), (flat == 0).nonzero()
    at, value = (left_out[0], 1) if len(chosen) < 2 and len(left_out) else (chosen[-1], 0)
    flat[at] = value
    return flat.reshape(mask.shape)


def _halved(row: torch.Tensor) -> torch.Tensor:
    """A mask without the second half of its entries; anything else as it is."""
    chosen = row.reshape(-1).nonzero()
    if not _is_mask(row) or len(chosen) < 2:
        return row
    flat = row.reshape(-1).clone()
    flat[chosen[-(len(chosen) // 2) :]] = 0
    return flat.reshape(row.shape)
