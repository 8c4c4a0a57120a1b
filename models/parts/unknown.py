"""What a tokenizer has no token for: reported when data is prepared, refused before it is spoken.

A word that became the unknown token is not said, and whatever comes out in its place sounds as if it were.
"""
import unicodedata

# Two letters that nobody has given a meaning: a tokenizer that tells them apart spells what it does not know.
PRIVATE = "\ue123\uf8a7"
SPEAKABLE = "LMN"  # Unicode categories: letters, accents, numbers. Signs may be left out unsaid.


class Unknown:
    """Tells which words and characters of a text a model's tokenizer has no token for."""

    def __init__(self, model):
        self.encode = model.encode_text
        self.pair, other = (self.encode(2 * c) for c in PRIVATE)  # a single character may be a case of its own
        spells = self.pair != other or not self.pair
        self.token = None if spells else self.pair[-1]
        self.known = {}  # {word: its pieces without a token}, since words come back

    def pieces(self, text) -> list[str]:
        """The characters of a text without a token, as often as they stand there; or the whole word, where
        whole words are tokens.
        """
        if self.token is None:
            return []
        found = []
        for word in text.split():
            if word not in self.known:
                self.known[word] = self._pieces_of(word)
            found += self.known[word]
        return found

    def _pieces_of(self, word):
        if self.token not in self.encode(word):
            return []
        alone = [c for c in word if unicodedata.category(c)[0] in SPEAKABLE + "PS" and self.encode(2 * c) == self.pair]
        spoken = [c for c in word if unicodedata.category(c)[0] in SPEAKABLE]
        whole = len(spoken) > 1 and set(spoken) <= set(alone)
        return ["".join(spoken)] if whole else alone


def is_spoken(piece):
    """Whether a piece would be heard: an emoji may stay unsaid, a letter may not."""
    return any(unicodedata.category(c)[0] in SPEAKABLE for c in piece)
