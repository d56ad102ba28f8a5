"""What of a request never reaches the model: texts that tokenizers cut, and words that they do not know."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from xdit_compile.capture.state.in_place import put_back, put_in_place

_LONGEST = 80
"""Letters of a text that a line shows."""
_ENDLESS = 10**9
"""Lengths beyond stand for none."""
_WORD = re.compile(r"\w[\w'-]*|[^\w\s]+")
_SPELLED = re.compile(r"[A-Za-z]{3,}")
"""Words of scripts in which a single letter means nothing."""


@contextlib.contextmanager
def listening(pipe: Any, texts: Sequence[tuple[str, str]], tell: Callable[[str], None]) -> Iterator[None]:
    """Look at what a pipeline's tokenizers are given, and tell once what they cut off or do not know.

    Args:
        texts: flags with the texts that they gave, by which a line names them.
        tell: is given each line.
    """
    said: set[tuple[str, ...]] = set()
    listeners = [_Listener(name, each, texts, tell, said) for name, each in _tokenizers(pipe).items()]
    put: list[Any] = []
    try:
        for each in listeners:
            put_in_place(each.tokenizer, {"__call__": each.call})
            put.append(each.tokenizer)
        yield
    finally:
        for tokenizer in put:
            put_back(tokenizer)


def _tokenizers(pipe: Any) -> dict[str, Any]:
    from transformers import PreTrainedTokenizerBase

    found = {name: getattr(part, "tokenizer", part) for name, part in getattr(pipe, "components", {}).items()}
    kept = {name: part for name, part in found.items() if isinstance(part, PreTrainedTokenizerBase)}
    return {name: part for name, part in kept.items() if next(key for key in kept if kept[key] is part) == name}


class _Listener:
    """Stands in the place of one tokenizer's ``__call__``.

    Args:
        said: what was told already, of other tokenizers too: words that two do not know are told of the first.
    """

    def __init__(
        self, name: str, tokenizer: Any, texts: Sequence[tuple[str, str]], tell: Callable[[str], None],
        said: set[tuple[str, ...]],
    ):  # fmt: skip
        self.tokenizer, self._name, self._texts, self._tell, self._said = tokenizer, name, texts, tell, said
        self._call = type(tokenizer).__call__

    def call(self, *arguments: Any, **options: Any) -> Any:
        """What the tokenizer makes of its arguments; those that are texts are looked at."""
        result = self._call(self.tokenizer, *arguments, **options)
        text = arguments[0] if arguments else options.get("text")
        for each in [text] if isinstance(text, str) else text if isinstance(text, list | tuple) else []:
            if isinstance(each, str) and each and len(arguments) < 2 and not options.get("text_pair"):
                # What is said of a text must never keep a picture from being made.
                with contextlib.suppress(Exception):
                    self._look(each, options)
        return result

    def _look(self, text: str, options: dict[str, Any]) -> None:
        if not (flag := self._flag(text)):
            return
        for key, line in (*self._cut(flag, text, options), *self._unknown(flag, text)):
            if key not in self._said:
                self._said.add(key)
                self._tell(line)

    def _flag(self, text: str) -> str | None:
        """The flag that a text is from: pipelines may put it in a frame, or make its letters small."""
        begin = _folded(text)
        return next((flag for flag, given in self._texts if _folded(given) and _folded(given) in begin), None)

    def _ids(self, text: str) -> list[int]:
        return list(self._call(self.tokenizer, text, add_special_tokens=False, truncation=False)["input_ids"])

    def _cut(self, flag: str, text: str, options: dict[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
        if options.get("truncation") in (None, False, "do_not_truncate"):
            return
        limit = options.get("max_length") or self.tokenizer.model_max_length
        specials = self.tokenizer.num_special_tokens_to_add() if options.get("add_special_tokens", True) else 0
        ids, room = self._ids(text), limit - specials
        if limit < _ENDLESS and len(ids) > room:
            lost = ids[: len(ids) - room] if self.tokenizer.truncation_side == "left" else ids[room:]
            words = one_line_of(self.tokenizer.decode(lost, skip_special_tokens=True))
            line = f"{flag} is cut at {limit} tokens by {self._name}: {words} is lost ({len(ids) - room} tokens)"
            yield (flag, self._name, line), line

    def _unknown(self, flag: str, text: str) -> Iterator[tuple[tuple[str, ...], str]]:
        words = list(dict.fromkeys(_WORD.findall(text)))
        pieces = {word: self._ids(word) for word in words}
        mark = self.tokenizer.unk_token_id
        unknown = [word for word, ids in pieces.items() if mark is not None and mark in ids]
        if unknown:
            yield (flag, "unknown", *unknown), f"{flag}: {self._name} does not know {_listed(unknown)}"
        letters = [word for word, ids in pieces.items() if word not in unknown and self._is_spelled(word, ids)]
        if letters:
            yield (flag, "letters", *letters), f"{flag}: {self._name} knows {_listed(letters)} letter by letter only"

    def _is_spelled(self, word: str, ids: list[int]) -> bool:
        return _SPELLED.fullmatch(word) is not None and len(ids) >= len(word)


def _folded(text: str) -> str:
    return "".join(text.casefold().split())


def _listed(words: list[str]) -> str:
    more = f" and {len(words) - 5} more words" if len(words) > 5 else ""
    return ", ".join(map(repr, words[:5])) + more


def one_line_of(text: str) -> str:
    """A text in quotes, on one line, its end left out where it is long."""
    text = " ".join(text.split())
    return repr(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}...")
