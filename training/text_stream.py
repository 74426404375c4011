"""Tokens into text as they come, and the strings that end it."""


class TextStream:
    """The text of one row, piece by piece.

    A piece is given out once it is certain: the bytes of a character may
    come in several tokens, and the beginning of a stop string may turn out
    to be one. The text ends before the first of the `stop` strings, which may
    span tokens; those in the prompt count nothing.

    `tokenizer` is one of the tokenizers package; special tokens are left out.
    Decoding starts from the last certain token, since tokenizers join words
    otherwise at the start of a text (the method of Hugging Face's
    text-generation-inference).
    """

    def __init__(self, tokenizer, prompt: list[int], stop=()):
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.ids = list(prompt)
        self.prompt_text = tokenizer.decode(self.ids)
        self.begin, self.certain = 0, len(self.ids)  # of what is decoded
        self.held = ''        # decoded, and perhaps the start of a stop string
        self.stopped = False

    def add(self, token: int) -> str:
        """The text that has become certain by one more token."""
        self.ids.append(token)
        text = self._decoded()
        if not text or text.endswith('\ufffd'):
            return ''         # a character is not whole yet
        self.begin, self.certain = self.certain, len(self.ids)
        return self._release(text)

    def end(self) -> str:
        """What is left when no token follows."""
        if self.stopped:
            return ''
        text = self._release(self._decoded())
        text += '' if self.stopped else self.held
        self.held, self.certain = '', len(self.ids)
        return text

    def _decoded(self):
        before = self.tokenizer.decode(self.ids[self.begin:self.certain])
        return self.tokenizer.decode(self.ids[self.begin:])[len(before):]

    def _release(self, text: str) -> str:
        self.held += text
        found = [at for at in map(self.held.find, self.stop) if at >= 0]
        if found:
            self.stopped = True
            text, self.held = self.held[:min(found)], ''
            return text
        keep = max((n for stop in self.stop for n in range(1, len(stop))
                    if self.held.endswith(stop[:n])), default=0)
        at = len(self.held) - keep
        text, self.held = self.held[:at], self.held[at:]
        return text
