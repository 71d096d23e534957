"""Text out of token ids as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from flm_megatron.data.tokenizer import Tokenizer

CONTEXT_IDS = 8
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a sequence that goes on after `prompt` until one of the strings in `stop`.

    `text` is what was said so far, without the stop string; `stopped` says that there was one.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()) -> None:
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, [string for string in stop if string]
        # Decoding starts in the prompt, for some tokenizers drop the space before a text's first word.
        self._ids = list(prompt[-CONTEXT_IDS:])
        self._start, self._read, self._shown = 0, len(self._ids), 0

    def feed(self, token: int) -> str:
        """Take the next id; returns the text that can be shown now."""
        self._ids.append(token)
        return self._take(self._decode(), final=False)

    def finish(self) -> str:
        """No more ids will come: what was held back."""
        return self._take(self._decode(final=True), final=True)

    def _decode(self, final: bool = False) -> str:
        """New text since the last whole character; a character may take several ids."""
        known = self._tokenizer.decode(self._ids[self._start : self._read])
        text = self._tokenizer.decode(self._ids[self._start :])
        if len(text) <= len(known) or (text.endswith(REPLACEMENT) and not final):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(known) :]

    def _take(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        searched = max(0, len(self.text) - max(map(len, self._stop), default=0))
        self.text += new
        found = [at for string in self._stop if (at := self.text.find(string, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        safe = len(self.text) if self.stopped or final else len(self.text) - self._held_back()
        shown, self._shown = self.text[self._shown : safe], max(safe, self._shown)
        return shown

    def _held_back(self) -> int:
        """Characters at the end with which a stop string may begin."""
        lengths = (n for string in self._stop for n in range(1, len(string)) if self.text.endswith(string[:n]))
        return max(lengths, default=0)
