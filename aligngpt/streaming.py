"""Tokens to text, piece by piece: the pieces of an answer are its decoded whole.

A tokenizer decodes a list of tokens, not one: SentencePiece drops the blank before the first word, a character may
have several tokens. Each new token is decoded behind the tokens of the piece before, so that a long answer costs no
more a token than a short one.
"""

from collections.abc import Sequence

from .processor import AlignGPTProcessor


class TextStream:
    """The text of one answer.

    Text is held back while it ends inside a character (bytes of one that is not complete, which decode to U+FFFD, and
    SentencePiece's byte tokens, decoded as a run), or while it may be the beginning of a stop string.

    Attributes:
        text: what was said, without special tokens and without the stop string.
        stopped: whether a stop string came.
    """

    def __init__(self, processor: AlignGPTProcessor, stop: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._processor, self._stop = processor, tuple(stop)
        added = processor.tokenizer.added_tokens_decoder
        self._unsaid = {token for token, entry in added.items() if entry.special}
        self._tokens: list[int] = []  # from the context on
        self._context = 0  # tokens before those that are not settled
        self._context_text = ""
        self._settled = ""  # text that no later token changes

    def add(self, token: int) -> str:
        """What can be said once `token` is there."""
        name = self._processor.tokenizer.convert_ids_to_tokens(token)
        if token in self._unsaid or name is None:  # a run of bytes goes on behind it, and behind what is no token
            return ""
        self._tokens.append(token)
        fresh = self._decoded(self._tokens)[len(self._context_text) :]
        if name.startswith("<0x") and name.endswith(">"):
            return ""
        if fresh.endswith("\ufffd"):
            return self._say(self._settled + fresh.rstrip("\ufffd"), is_last=False)
        self._settled += fresh
        context = self._tokens[self._context :]
        if text := self._decoded(context):  # a blank that is dropped at the beginning is no context
            self._tokens, self._context, self._context_text = context, len(context), text
        else:
            self._context, self._context_text = len(self._tokens), self._context_text + fresh
        return self._say(self._settled, is_last=False)

    def end(self) -> str:
        """What was held back."""
        return self._say(self._settled + self._decoded(self._tokens)[len(self._context_text) :], is_last=True)

    def _decoded(self, tokens: list[int]) -> str:
        return self._processor.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _say(self, text: str, *, is_last: bool) -> str:
        """What of `text`, the answer so far, was not said yet."""
        if self.stopped:
            return ""
        found = [place for stop in self._stop if (place := text.find(stop, max(len(self.text) - len(stop), 0))) >= 0]
        if found:
            text, self.stopped = text[: min(found)], True
        elif not is_last:
            text = text[: len(text) - max((_begun(text, stop) for stop in self._stop), default=0)]
        piece = text[len(self.text) :]
        self.text += piece
        return piece


def _begun(text: str, stop: str) -> int:
    """Characters at the end of `text` that begin `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
