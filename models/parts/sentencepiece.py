"""Text to token ids and back, from a SentencePiece .model file (arXiv 1808.06226), read without its library.

    text -> normalised, a space becoming U+2581 -> pieces, by merging (BPE) or the best path (unigram) -> ids

The file is one protobuf message: the pieces with score and type, and how text is normalised, which is a trie
of prefixes and what replaces them. Pieces and ids equal those of the `sentencepiece` library, version 0.2.3.
Refused are the model types WORD and CHAR, pieces marked as unused and rules for after decoding; published
models have none.
"""
import operator
import struct
from array import array

from models.parts import Invalid
from models.parts.plain import read_bytes
from models.parts.tokenizer import check_characters, find_longest, merge_pairs

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces
UNIGRAM, BPE = 1, 2
FAR = 100_000  # a float32 sum this large has few bits left behind the point: counting begins at zero again
MARKER = "\u2581"
# What fields raise that are cut short or of another kind than expected.
MISFITS = (IndexError, KeyError, AttributeError, TypeError, UnicodeDecodeError)
LARGEST_FILE = 64 << 20  # bytes: the published ones have at most 5 MB
LONGEST_VARINT = 70  # bits: what protobuf writes has ten bytes
UNKNOWN_COST = 10  # the library's: an unknown character scores this much below the worst piece


class SentencePiece:
    """A .model file, given as a path or as its bytes.

    unk_id, bos_id, eos_id and pad_id are None where the model has no such piece.
    """

    def __init__(self, source):
        self.name = "the SentencePiece model" if isinstance(source, bytes) else str(source)
        try:
            self._read(source if isinstance(source, bytes) else read_bytes(source, LARGEST_FILE))
        except (Damaged, struct.error, *MISFITS) as e:
            raise Invalid(f"{self.name} cannot be read as a SentencePiece model ({type(e).__name__}: {e}). "
                          "Copy it from the checkpoint again.") from None

    def encode(self, text) -> list[int]:
        return [i for i, _ in self._tokens(text)]

    def pieces(self, text) -> list[str]:
        """The pieces of encode's ids; a run of unknown characters is one, spelled as normalised."""
        return [piece for _, piece in self._tokens(text)]

    def id(self, piece) -> int:
        """The id of a piece, or that of the unknown piece."""
        return self.vocab.get(piece, self.unk_id)

    def __len__(self):
        return len(self.piece)

    def decode(self, ids) -> str:
        """Ids to text. Control pieces vanish, unknown ones leave a mark, a marker at the start is none."""
        text, run, at_start = "", b"", self.add_dummy_prefix or self.remove_extra_whitespaces
        for i in map(operator.index, ids):
            if not 0 <= i < len(self):
                raise Invalid(f"{self.name} has no piece with id {i}, only {len(self)} pieces. "
                              "Is it this model's?")
            if self.types[i] == BYTE:
                run += bytes.fromhex(self.piece[i][3:5])
                continue
            text, run = text + utf8_or_marks(run), b""
            piece = {CONTROL: "", UNKNOWN: self.unk_surface}.get(self.types[i], self.piece[i])
            if at_start and not text and piece.startswith(MARKER):
                piece = piece[1:]
                at_start = self.remove_extra_whitespaces  # where spaces are kept, one was put there
            text += piece.replace(MARKER, " ")
        return text + utf8_or_marks(run)

    # --------------------------------------------------------------------------------------- reading the file

    def _read(self, data):
        self.piece, self.scores, self.types = [], array("f"), []
        trainer, normalizer, denormalizer = {}, {}, {}
        for number, value in fields(data):
            if number == 1:
                piece = dict(fields(value))
                self.piece.append(piece[1].decode())
                self.scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
                self.types.append(piece.get(3, NORMAL))
            elif number in (2, 3, 5):
                {2: trainer, 3: normalizer, 5: denormalizer}[number].update(fields(value))
        self.model_type = trainer.get(3, UNIGRAM)
        unused, after = self.types.count(UNUSED), len(denormalizer.get(2, b""))
        if self.model_type not in (UNIGRAM, BPE) or unused or after:
            raise Invalid(f"{self.name} has model type {self.model_type}, {unused} unused pieces and {after} "
                          "bytes of rules for after decoding; supported are types 1 (unigram) and 2 (BPE) "
                          "without the other two")
        unknown = self.types.count(UNKNOWN)
        if unknown != 1:
            raise Damaged(f"{unknown} of {len(self.piece)} pieces are of type unknown, expected one")

        self.vocab = {piece: i for i, piece in enumerate(self.piece)}
        self.unk_id = self.types.index(UNKNOWN)
        self.bos_id = self._control_id(trainer.get(46, b"<s>"))
        self.eos_id = self._control_id(trainer.get(47, b"</s>"))
        self.pad_id = self._control_id(trainer.get(48, b"<pad>"))
        self.unk_surface = trainer.get(44, " \u2047 ".encode()).decode()
        self.byte_ids = [self.vocab[f"<0x{b:02X}>"] for b in range(256)] if trainer.get(35) else None
        self.marker_behind = trainer.get(24, False)  # treat_whitespace_as_suffix
        self.add_dummy_prefix, self.remove_extra_whitespaces, self.escape_whitespaces = (
            bool(normalizer.get(number, True)) for number in (3, 4, 5))
        self._read_rules(normalizer.get(2, b""))
        self._prepare()

    def _control_id(self, name):
        i = self.vocab.get(name.decode())
        return i if i is not None and self.types[i] == CONTROL else None

    def _read_rules(self, rules):
        """precompiled_charsmap: the size of the trie, the trie, the replacements, each closed by a zero."""
        size = struct.unpack_from("<I", rules)[0] if rules else 0
        self.trie = struct.unpack(f"<{size // 4}I", rules[4:4 + size])
        self.replacements = rules[4 + size:]
        for i, unit in enumerate(self.trie):
            if unit >> 31:  # the end of a rule: where its replacement begins
                sound = unit & 0x7FFFFFFF < len(self.replacements)
            else:
                sound = (i ^ children(unit)) | 0xFF < len(self.trie)
            if not sound or self.replacements[-1:] != b"\0":
                raise Damaged(f"its normalisation rules are broken at unit {i}")

    def _prepare(self):
        """What encoding looks pieces up in. Control and byte pieces never come from text and are left out."""
        found = {piece: i for piece, i in self.vocab.items() if self.types[i] in (NORMAL, USER_DEFINED)}
        defined = [piece for piece, i in found.items() if self.types[i] == USER_DEFINED]
        self.find_defined = find_longest(defined)
        if self.model_type == BPE:
            best_first = sorted(set(self.scores), reverse=True)
            order = {score: rank for rank, score in enumerate(best_first)}
            self.ranks = {piece: order[self.scores[i]] for piece, i in found.items()}
            return
        normal = [score for score, kind in zip(self.scores, self.types) if kind == NORMAL]
        self.scores[self.unk_id] = min(normal, default=0.0) - UNKNOWN_COST
        self.tree = {}  # one dictionary per character of a piece; behind the last one "" leads to its id
        for piece, i in found.items():
            if self.types[i] == USER_DEFINED:  # better than free, and a long one more than two short ones
                self.scores[i] = 0.1 * (len(piece.encode()) - 1)
            node = self.tree
            for char in piece:
                node = node.setdefault(char, {})
            node[""] = i

    # -------------------------------------------------------------------------------------------- normalising

    def normalize(self, text) -> str:
        """The text that is cut into pieces: with the file's replacements, and markers for spaces."""
        thin, at, parts = self.remove_extra_whitespaces, 0, []
        while thin and at < len(text):
            part, end = self._replace(text, at)
            if part != " ":
                break
            at = end
        if at == len(text):  # nothing, or only spaces: not even a marker
            return ""
        after_space = thin
        while at < len(text):
            part, at = self._replace(text, at)
            part = part.lstrip(" ") if after_space else part
            if part:
                parts.append(part)
                after_space = thin and part.endswith(" ")
        space = MARKER if self.escape_whitespaces else " "
        dummy = space if self.add_dummy_prefix else ""
        text = ("" if self.marker_behind else dummy) + "".join(parts).replace(" ", space)
        text = text.rstrip(space) if thin else text
        return text + dummy if self.marker_behind else text

    def _replace(self, text, at):
        """What the longest rule that fits here makes of the text, and where that rule ends.

        A unit of the trie (a double array as in Darts-clone) holds the byte it stands for, whether a rule
        ends with it, and the way to its children, which goes by exclusive or. User-defined pieces are exempt
        from the rules.
        """
        defined = self.find_defined.match(text, at)
        if defined:
            return defined[0], defined.end()
        rule, rule_end = None, at + 1
        node = children(self.trie[0]) if self.trie else None
        end = at
        while node is not None and end < len(text):
            for byte in text[end].encode():
                unit = self.trie[node ^ byte]
                if unit & 0x800000FF != byte:
                    node = None
                    break
                node ^= byte ^ children(unit)
            end += 1
            if node is not None and unit & 0x100:
                rule, rule_end = self.trie[node] & 0x7FFFFFFF, end
        if rule is None:
            return text[at], rule_end
        return self.replacements[rule:self.replacements.index(0, rule)].decode(), rule_end

    # ------------------------------------------------------------------------------------ from text to pieces

    def _tokens(self, text) -> list[tuple[int, str]]:
        """(id, piece) in turn; what is unknown becomes bytes if the model has them, else one piece a run."""
        check_characters(text)
        cut = self._merge if self.model_type == BPE else self._best_path
        tokens, after_unknown = [], False
        for i, piece in cut(self.normalize(text)):
            unknown = i == self.unk_id
            if unknown and self.byte_ids:
                ids = [self.byte_ids[byte] for byte in piece.encode()]
                tokens += [(byte_id, self.piece[byte_id]) for byte_id in ids]
            elif unknown and after_unknown:
                tokens[-1] = i, tokens[-1][1] + piece
            else:
                tokens.append((i, piece))
            after_unknown = unknown
        return tokens

    def _merge(self, text):
        """BPE: merge the neighbours whose union scores best; user-defined pieces take no part in it."""
        pieces, done = [], 0
        for defined in self.find_defined.finditer(text):
            pieces += merge_pairs(text[done:defined.start()], self._rank) + [defined[0]]
            done = defined.end()
        pieces += merge_pairs(text[done:], self._rank)
        return [(self.vocab[p] if p in self.ranks else self.unk_id, p) for p in pieces]

    def _rank(self, a, b):
        return self.ranks.get(a + b)

    def _best_path(self, text):
        """Unigram: the pieces whose scores have the largest sum (Viterbi).

        Sums are kept in float32 as in the library: between "I II" and "II I" it is their last bit that
        decides.
        """
        size, frontier = len(text) + 1, 0
        best, total = array("f", bytes(4 * size)), array("f", [0])  # arrays, since these round
        starts, ids = [None] * size, [None] * size
        for start in range(len(text)):
            here, node, edges = best[start], self.tree, []
            if abs(here) > FAR:
                for end in range(start, frontier + 1):
                    best[end] -= here
                here = 0.0
            for end in range(start + 1, size):
                node = node.get(text[end - 1])
                if node is None:
                    break
                if "" in node:
                    edges.append((end, node[""]))
            if not edges or edges[0][0] > start + 1:
                edges.append((start + 1, self.unk_id))
            for end, i in edges:
                total[0] = here + self.scores[i]
                if starts[end] is None or total[0] > best[end]:
                    best[end], starts[end], ids[end] = total[0], start, i
                frontier = max(frontier, end)
        path, end = [], len(text)
        while end > 0:
            path.append((ids[end], text[starts[end]:end]))
            end = starts[end]
        return path[::-1]


# ------------------------------------------------------------------------------------------------ bytes


class Damaged(Exception):
    """What is wrong with the bytes of a file, to be completed by the file's name."""


def fields(data):
    """The fields of a protobuf message: yields (number, value), an int for a varint, else bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, shift, at = value | (byte & 127) << shift, shift + 7, at + 1
            if byte < 128:
                return value
            if shift > LONGEST_VARINT:
                raise Damaged(f"a number at byte {at} has no end")

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise Damaged(f"no field begins at byte {at}")
        size = {1: 8, 5: 4}.get(wire) or varint()
        if at + size > len(data):
            raise Damaged(f"it ends {at + size - len(data)} bytes early")
        yield number, data[at:at + size]
        at += size


def children(unit):
    """Where a unit of the trie has its children, relative to its own place."""
    return (unit >> 10) << ((unit & 0x200) >> 6)


def utf8_or_marks(run):
    """Bytes as text, with one U+FFFD for each byte that is no part of a character."""
    text, at = "", 0
    while at < len(run):
        size = 1 + (run[at] >= 0xC0) + (run[at] >= 0xE0) + (run[at] >= 0xF0)
        try:
            text += run[at:at + size].decode()
        except UnicodeDecodeError:
            text, size = text + "\ufffd", 1
        at += size
    return text
