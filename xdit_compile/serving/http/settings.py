"""What whoever starts a server decides about its HTTP side."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may ask for at most; more is refused before anything runs.

    Args:
        json_bytes, form_bytes: of a request's body, as JSON and as a form with files.
        body_s: seconds within which a body has to be here.
        prompt_bytes: of a prompt, and of a negative one, in UTF-8.
        side: pixels of a height or width.
        pixels: of one picture or frame that is made.
        total_pixels: of all pictures and frames of a request together.
        images: pictures of a request.
        steps: of the scheduler.
        frames: of a video.
        tokens: of a prompt, where a request says to how many it is filled up.
        picture_bytes, picture_pixels: of a picture that is sent.
        argument_depth: lists and objects inside of one another in ``arguments``.
        argument_items: of one list or object there.
        argument_number: how far from zero a number there may be: it may be a length.
    """

    json_bytes: int = 1 << 20
    form_bytes: int = 64 << 20
    body_s: float = 60.0
    prompt_bytes: int = 32 << 10
    side: int = 8192
    pixels: int = 4096 * 4096
    total_pixels: int = 1 << 28
    images: int = 10
    steps: int = 1000
    frames: int = 1000
    tokens: int = 4096
    picture_bytes: int = 32 << 20
    picture_pixels: int = 8192 * 8192
    argument_depth: int = 8
    argument_items: int = 1000
    argument_number: float = 10_000


@dataclasses.dataclass(frozen=True)
class Keep:
    """How much of what was made is kept for those who asked for URLs, and of videos.

    Args:
        count: files.
        bytes: of all of them together.
        seconds: that a file is kept.
        jobs: videos that are known, ended ones included.
    """

    count: int = 256
    bytes: int = 1 << 30
    seconds: float = 3600.0
    jobs: int = 256


@dataclasses.dataclass(frozen=True)
class Settings:
    """Of the HTTP side.

    Args:
        api_key: what clients have to send as ``Authorization: Bearer KEY``; None lets everyone in.
        cors_origins: whose pages a browser lets read answers; none by default.
        limits: what a request may ask for.
        keep: what is kept after an answer.
    """

    api_key: str | None = dataclasses.field(default=None, repr=False)
    cors_origins: tuple[str, ...] = ()
    limits: Limits = Limits()
    keep: Keep = Keep()
