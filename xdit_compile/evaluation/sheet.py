"""A contact sheet: the pictures of one process above those of the plan, captions below, wrong ones marked."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .checker import Verdict
from .fidelity import JUDGED, Pair

MOST = 16
_COLUMNS = 4
_SIDE = 224
_GAP = 12
_LABEL = 96
_LINE = 16
_TEXT_LINES = 5
_LETTERS = 34
_FONT = 13
_INK, _PAPER, _WRONG = (25, 25, 25), (255, 255, 255), (200, 30, 30)


def contact_sheet(
    pairs: Sequence[Pair], plan: np.ndarray, reference: np.ndarray, labels: tuple[str, str] = ("one process", "plan")
) -> Image.Image:
    """The first 16 pairs in strips of four.

    Args:
        plan, reference: ``(n, height, width, 3)``, uint8.
        labels: what to call the rows of the reference and of the plan.
    """
    count = min(len(pairs), MOST)
    columns = min(count, _COLUMNS)
    height = max(round(_SIDE * plan.shape[1] / plan.shape[2]), 1)
    strip = 2 * (height + _GAP) + _TEXT_LINES * _LINE + _GAP
    strips = -(-count // columns)
    sheet = Image.new("RGB", (_LABEL + columns * (_SIDE + _GAP), strips * strip + _GAP), _PAPER)
    for index in range(count):
        left, top = _LABEL + index % columns * (_SIDE + _GAP), index // columns * strip + _GAP
        pair = pairs[index]
        for row, (image, verdict) in enumerate(((reference[index], pair.reference), (plan[index], pair.plan))):
            _paste(sheet, image, (left, top + row * (height + _GAP)), (_SIDE, height), verdict)
            if index % columns == 0:
                _write(sheet, (_GAP, top + row * (height + _GAP)), textwrap.wrap(labels[row], 12))
        _write(sheet, (left, top + 2 * (height + _GAP) - _GAP // 2), _lines(pair), _WRONG if _is_wrong(pair) else _INK)
    return sheet


def _paste(
    sheet: Image.Image, image: np.ndarray, top_left: tuple[int, int], size: tuple[int, int], verdict: Verdict | None
) -> None:
    sheet.paste(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS), top_left)
    if verdict is not None and not verdict.right:
        corners = (top_left[0] - 4, top_left[1] - 4, top_left[0] + size[0] + 3, top_left[1] + size[1] + 3)
        ImageDraw.Draw(sheet).rectangle(corners, outline=_WRONG, width=4)


def _write(
    sheet: Image.Image, top_left: tuple[int, int], lines: Sequence[str], ink: tuple[int, int, int] = _INK
) -> None:
    font = ImageFont.load_default(size=_FONT)
    for number, line in enumerate(lines):
        ImageDraw.Draw(sheet).text((top_left[0], top_left[1] + number * _LINE), line, fill=ink, font=font)


def _lines(pair: Pair) -> list[str]:
    """The caption in at most three lines, how far the pictures lie apart, and what is wrong with either."""
    caption = textwrap.wrap(pair.question.caption, _LETTERS, max_lines=3, placeholder=" ...")
    level = "identical" if pair.distance.psnr is None else f"{pair.distance.psnr:.1f} dB"
    wrong = [_complaint(pair.reference), _complaint(pair.plan)]
    if wrong[0] == wrong[1]:
        said = [f"both wrong: {wrong[0]}"] if wrong[0] else []
    else:
        said = [f"{name} wrong: {what}" for name, what in zip(("upper", "lower"), wrong, strict=True) if what]
    return [*caption, *textwrap.wrap("; ".join([level, *said]), _LETTERS, max_lines=2, placeholder=" ...")]


def _complaint(verdict: Verdict | None) -> str:
    if verdict is None or verdict.right:
        return ""
    wrong = [what for what in JUDGED[1:] if not getattr(verdict, what)]
    return "count" if "count" in wrong else ", ".join(wrong)


def _is_wrong(pair: Pair) -> bool:
    return any(verdict is not None and not verdict.right for verdict in (pair.reference, pair.plan))
