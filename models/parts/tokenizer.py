"""Text to token ids and back, from a published tokenizer.json: byte-pair encoding (arXiv 1508.07909) by hand.

    text -> added tokens cut out -> normalised -> cut into words -> characters, merged pair by pair -> ids

Two kinds are read. Byte-level (Llama 3, Qwen 2, GPT-2): a pattern cuts the text into words, and the
characters that are merged stand for the 256 bytes. SentencePiece style (MiniCPM, Llama 2): a space becomes
U+2581, and a character that the vocabulary lacks becomes its UTF-8 bytes, written <0x..>, or the unknown
token, or nothing where the file names none. Ids equal those of the `tokenizers` library. What else a
tokenizer.json may hold is refused by name when it is opened; only its `truncation` and `padding` are passed
over, being settings of one call of whoever saved it.
"""
import heapq
import operator
import re
import unicodedata
from array import array

from models.parts import Invalid
from models.parts.plain import as_record, need, read_object, shown, written
from models.parts.textfiles import LONGEST_SAID

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
QWEN2 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")

PARTS = {  # a part of the file: how it names its steps where they are several, and the kinds known here
    "normalizer": ("normalizers", ["Prepend", "Replace", "NFC"]),
    "pre_tokenizer": ("pretokenizers", ["Split", "ByteLevel", "Metaspace"]),
    "decoder": ("decoders", ["ByteLevel", "Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"]),
    "post_processor": ("processors", ["TemplateProcessing", "ByteLevel"]),
}
VALUES = {  # what a step must hold beside its type
    "Prepend": {"prepend": str},
    "Replace": {"pattern": dict, "content": str},
    "Split": {"pattern": dict, "behavior": str, "invert": bool},
    "Metaspace": {"replacement": str},
    "Strip": {"content": str, "start": int, "stop": int},
}
EDGES = {"at_least": 0, "at_most": 1000}  # characters that are stripped
FLAGS = ("special", "normalized", "single_word", "lstrip", "rstrip")  # of an added token
MOST_GROWTH = 32  # times: the published ones put three bytes in place of a space; doubling in turn has no end
CACHED_WORDS, CACHED_LENGTH = 1 << 16, 256  # a longer word is merged anew each time; a full cache starts over
WHITE = "\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))

# GPT-2 writes byte b as chr(b) where that is visible; the other 68 become, in order, U+0100 and up.
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
HIDDEN = [b for b in range(256) if b not in VISIBLE]
BYTE_TO_CHAR = {b: chr(b) for b in VISIBLE} | {b: chr(256 + i) for i, b in enumerate(HIDDEN)}
CHAR_TO_BYTE = {char: b for b, char in BYTE_TO_CHAR.items()}


# ----------------------------------------------------------------------------------------------- the patterns


class StandIn(dict):
    """For str.translate: every character becomes an ASCII one that the published patterns treat alike.

    Python's re has no \\p{L}, but it can run a pattern on this stand-in, whose positions are those of the
    text. ASCII stands for itself, since contractions and newlines are spelled out. Under re.ASCII, \\s leaves
    out U+001C to U+001F, which Python counts as white space and Unicode does not.
    """

    def __missing__(self, code):
        char = chr(code)
        if code >= 128:
            char = "\t" if char in WHITE else {"L": "a", "N": "0"}.get(unicodedata.category(char)[0], "!")
        if code == 0x17F:
            char = "S"  # the long s is an s when case is ignored: Llama 3 sees a contraction in 'ſ, GPT-2 not
        self[code] = char
        return char


def runnable(published):
    """A published pattern as one for stand-in text: \\p{L} and \\p{N} become ASCII ranges."""
    def without_brackets(m):
        return m[0].replace(r"\p{L}", "A-Za-z").replace(r"\p{N}", "0-9")

    pattern = re.sub(r"\[\^[^\]]+\]", without_brackets, published)
    return re.compile(pattern.replace(r"\p{L}", "[A-Za-z]").replace(r"\p{N}", "[0-9]"), re.ASCII)


STAND_IN = StandIn()
PATTERNS = {published: runnable(published) for published in (GPT2, QWEN2, LLAMA3)}


def split(text, published):
    """Cut text into words. Each of the three patterns covers any text without a gap."""
    matches = PATTERNS[published].finditer(text.translate(STAND_IN))
    return [text[m.start():m.end()] for m in matches]


# ---------------------------------------------------------------------------------------------- the tokenizer


class Tokenizer:
    """A tokenizer.json, given as a path or as the parsed dictionary.

    `vocab` maps piece -> id, added tokens included; `unk_id` is None where the file names no unknown token.
    rows: of the model's table, beyond which no text may lead.
    """

    def __init__(self, source, rows=None):
        self.rows = rows
        is_path = not isinstance(source, dict)
        self.name = str(source) if is_path else "tokenizer.json"
        spec = read_object(source) if is_path else as_record(source, self.name)
        model = need(spec, "model", dict)
        self._allow("model.type", need(model, "type", str, "BPE"), ["BPE"])
        for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            self._allow(f"model.{key}", model.get(key) or None, [None])
        self.normalizers, self.pre_tokenizers, self.decoders, self.post_processors = (
            self._steps(need(spec, part, dict, None), part) for part in PARTS)

        self.model_vocab = need(model, "vocab", dict)  # what merging can reach
        self._check_ids(self.model_vocab)
        merges = [m.split(" ") if isinstance(m, str) else m for m in need(model, "merges", list)]
        if not all(map(is_pair, merges)):
            raise Invalid(f"{self.name}: merges must be pairs, written 'a b' or ['a', 'b']")
        self.ranks = {(a, b): rank for rank, (a, b) in enumerate(merges)}
        self.unk_token = need(model, "unk_token", str, None)
        needed = {self.unk_token}
        for a, b in merges:
            needed |= {a, b, a + b}
        missing = sorted(needed - self.model_vocab.keys() - {None})
        if missing:
            raise Invalid(f"{self.name}: {shown(repr(missing[0]))} occurs in a merge or as unknown token, "
                          "but not in the vocabulary. The file is damaged; copy it again.")
        self.unk_id = self.model_vocab.get(self.unk_token)
        self.fuse_unk, self.ignore_merges = model.get("fuse_unk"), model.get("ignore_merges")
        usable = self.model_vocab if model.get("byte_fallback") else {}
        byte_pieces = [f"<0x{b:02X}>" for b in range(256)]
        self.byte_pieces = [piece if piece in usable else None for piece in byte_pieces]
        self.cache = {}

        added = [self._added(token) for token in need(spec, "added_tokens", list[dict], [])]
        self.vocab = self.model_vocab | {token["content"]: token["id"] for token in added}
        self.piece = {i: piece for piece, i in self.vocab.items()}
        self.special_ids = {token["id"] for token in added if token["special"]}
        # A normalised token is searched in its normalised form, which has the marker in front if Prepend adds
        # one.
        self.raw_tokens = {token["content"]: token for token in added if not token["normalized"]}
        normal = [token for token in added if token["normalized"]]
        self.normal_tokens = {self._normalize(token["content"]): token for token in normal}
        self.find_raw, self.find_normal = find_longest(self.raw_tokens), find_longest(self.normal_tokens)

    def encode(self, text, special=False, template=False) -> list[int]:
        """Text to ids. Special tokens that stand in the text are plain characters, unless special=True.

        template=True puts the file's own first and last tokens around the ids. Added tokens that the file
        does not call special are ordinary words, found either way.
        """
        check_characters(text)
        ids = []
        for start, part, token in cut(text, self.find_raw, self.raw_tokens, special):
            ids += self._encode_part(part, start, special) if token is None else [token]
        for step in self.post_processors:
            if template and step["type"] == "TemplateProcessing":
                ids = in_template(ids, step)
        check_ids(ids, self.rows, self.name)
        return ids

    def _encode_part(self, part, start, special):
        """Ids of what lies between added tokens that are searched in the raw text."""
        ids = []
        for inner, text, token in cut(self._normalize(part), self.find_normal, self.normal_tokens, special):
            if token is not None:
                ids.append(token)
                continue
            for word in self._words(text, start + inner == 0):
                ids += self._encode_word(word)
        return ids

    def pieces(self, text, special=False) -> list[str]:
        """The pieces of encode's ids; what the vocabulary lacks shows as <0x..> per byte or as unknown."""
        return [self.piece[i] for i in self.encode(text, special)]

    def id(self, piece) -> int | None:
        return self.vocab.get(piece)

    def decode(self, ids, special=False) -> str:
        """Ids to text. Special tokens are left out, unless special=True."""
        try:
            ids = [operator.index(i) for i in ids]
        except TypeError:
            raise Invalid(f"{self.name}: ids are whole numbers, found {shown(list(ids))}") from None
        unknown = [i for i in ids if i not in self.piece]
        if unknown:
            raise Invalid(f"{self.name} has no token with id {unknown[0]}, only {len(self.piece)} tokens. "
                          "Is it the tokenizer of this model?")
        tokens = [self.piece[i] for i in ids if special or i not in self.special_ids]
        for step in self.decoders:
            tokens = decode_step(step, tokens)
        return ("" if self.decoders else " ").join(tokens)

    # --------------------------------------------------------------------------------------- reading the file

    def _allow(self, what, value, allowed, choices=None):
        if value not in allowed:
            choices = choices or ", ".join(map(str, allowed))
            found = shown(written(value))
            raise Invalid(f"{self.name}: {what} is {found}, which is not supported; known: {choices}. "
                          "Is this the tokenizer of a model that is supported?")

    def _steps(self, step, part) -> list[dict]:
        """A part of the file as a flat list of steps, each of a kind that this module carries out."""
        several, kinds = PARTS[part]
        if step is None:
            return []
        step = as_record(step, f"{self.name}: {part}")
        kind = need(step, "type", str)
        if kind == "Sequence":
            steps = []
            for one in need(step, several, list[dict]):
                steps += self._steps(one, part)
            return steps
        self._allow(f"{part} type", kind, kinds)
        for key, wanted in VALUES.get(kind, {}).items():
            need(step, key, wanted, **(EDGES if wanted is int else {}))
        if kind == "Strip" and len(step["content"]) != 1:
            raise Invalid(f"{step.where} strips {shown(repr(step['content']))}, expected one character")
        if kind == "ByteLevel" and part == "pre_tokenizer":
            need(step, "add_prefix_space", bool)
        if kind == "TemplateProcessing":
            self._check_template(step)
        if kind == "Replace":
            self._allow(f"{part} Replace pattern", list(step["pattern"]), [["String"]])
            if not need(step["pattern"], "String", str):
                raise Invalid(f"{step.where} replaces an empty text, which stands everywhere")
        if kind == "Split":
            pattern = step["pattern"].get("Regex", step["pattern"])
            choices = "the patterns of GPT-2, Llama 3 and Qwen 2"
            self._allow(f"{part} Split pattern", pattern, list(PATTERNS), choices)
            same_cuts = [("Isolated", False), ("Removed", True)]  # as the patterns leave no gap
            self._allow(f"{part} Split behavior, invert", (step["behavior"], step["invert"]), same_cuts)
        if kind == "Metaspace":  # files from before prepend_scheme say add_prefix_space
            scheme = "never" if step.get("add_prefix_space") is False else "always"
            step = {"prepend_scheme": scheme, "split": True, **step}
        return [step]

    def _added(self, token):
        """An added token with every flag that is looked at."""
        token = as_record(token, f"{self.name}: added_tokens")
        flags = {flag: need(token, flag, bool) for flag in FLAGS}
        content = need(token, "content", str)
        if not content:
            raise Invalid(f"{token.where} holds an empty text, which stands everywhere")
        return {**flags, "content": content, "id": need(token, "id", int, at_least=0)}

    def _check_ids(self, vocab):
        wrong = [piece for piece, i in vocab.items() if type(i) is not int or i < 0]
        if wrong:
            raise Invalid(f"{self.name}: the vocabulary gives {shown(repr(wrong[0]))} the id "
                          f"{shown(written(vocab[wrong[0]]))}, expected a whole number of at least 0")

    def _check_template(self, step):
        special = need(step, "special_tokens", dict[str, dict])
        for part in need(step, "single", list[dict]):
            name = need(part, "SpecialToken", dict, {}).get("id")
            if name is not None:
                need(need(special, str(name), dict), "ids", list[int])

    # ------------------------------------------------------------------------------------- from text to words

    def _normalize(self, text):
        most = MOST_GROWTH * (len(text) + 1)
        for step in self.normalizers:
            if step["type"] == "Prepend":
                text = step["prepend"] + text if text else ""
            elif step["type"] == "Replace":
                old, new = step["pattern"]["String"], step["content"]
                if len(text) + text.count(old) * (len(new) - len(old)) > most:
                    raise Invalid(f"{self.name}: its normalizer makes {len(text)} characters more than "
                                  f"{most} long. Is it the tokenizer of this model?")
                text = text.replace(old, new)
            else:  # the library's table is of Unicode 9; it may order newer combining marks differently
                text = unicodedata.normalize("NFC", text)
        return text

    def _words(self, text, at_start):
        """Text between added tokens, cut into the words that are merged one by one."""
        words = [text]
        for step in self.pre_tokenizers:
            parts = []
            for i, word in enumerate(words):
                if step["type"] == "Split":
                    parts += split(word, step["pattern"]["Regex"])
                elif step["type"] == "ByteLevel":
                    parts += byte_level(word, step)
                else:
                    parts += metaspace(word, step, at_start and i == 0)
            words = parts
        return words

    # -------------------------------------------------------------------------------------- from words to ids

    def _encode_word(self, word) -> list[int]:
        if self.ignore_merges and word in self.model_vocab:
            return [self.model_vocab[word]]
        ids = self.cache.get(word)
        if ids is None:
            ids = [self.model_vocab[piece] for piece in merge_pairs(self._symbols(word), self._rank)]
            if len(word) < CACHED_LENGTH:
                if len(self.cache) >= CACHED_WORDS:
                    self.cache.clear()
                self.cache[word] = ids
        return ids

    def _rank(self, a, b):
        return self.ranks.get((a, b))

    def _symbols(self, word) -> list[str]:
        """One symbol per character, or its bytes, or the unknown token, one for a run if they are fused.

        The library appends an unknown token late, behind bytes that follow it; so it waits here, too.
        """
        symbols, waiting = [], []
        for char in word:
            in_bytes = [self.byte_pieces[b] for b in char.encode()]
            if char in self.model_vocab:
                symbols += [*waiting, char]
                waiting = []
            elif None not in in_bytes:
                symbols += in_bytes
            elif self.unk_token is not None:
                symbols += [] if self.fuse_unk else waiting
                waiting = [self.unk_token]
        return symbols + waiting


def is_pair(merge):
    return isinstance(merge, list) and len(merge) == 2 and all(isinstance(half, str) for half in merge)


def in_template(ids, step):
    """The file's own first and last tokens around the ids."""
    out = []
    for part in step["single"]:
        if "SpecialToken" in part:
            name = part["SpecialToken"]["id"]
            out += step["special_tokens"][name]["ids"]
        else:
            out += ids
    return out


def byte_level(word, step):
    """Cut by GPT-2's pattern, where the file wants that, and one visible character for each byte."""
    if step["add_prefix_space"] and not word.startswith(" "):
        word = " " + word
    parts = split(word, GPT2) if step.get("use_regex", True) else [word]
    return [part.encode().decode("latin-1").translate(BYTE_TO_CHAR) for part in parts]


def metaspace(word, step, first):
    """A marker for each space and, by the file's scheme, one in front; cut before each marker."""
    marker, scheme = step["replacement"], step["prepend_scheme"]
    word = word.replace(" ", marker)
    in_front = scheme == "always" or scheme == "first" and first
    if in_front and not word.startswith(marker):
        word = marker + word
    return re.split(f"(?!^)(?={re.escape(marker)})", word) if step["split"] else [word]


# ------------------------------------------------------------------------------------------------ merging


def merge_pairs(symbols, rank) -> list[str]:
    """Merge the neighbours of lowest rank(left, right), leftmost first, until every rank is None.

    Places wait in one bucket per rank, named by the symbol on the left; the symbols are a linked list. One
    queue of all places would do too, but then a word of 100,000 characters costs 16 times one of 10,000.
    """
    symbols = [None, *symbols, None]  # None: an edge, or a symbol that its left neighbour took in
    size = len(symbols)
    before, after = array("l", range(-1, size - 1)), array("l", range(1, size + 1))
    buckets, queue = {}, []

    def rank_at(left):
        a, b = symbols[left], symbols[after[left]]
        return None if a is None or b is None else rank(a, b)

    def wait(places, r):
        if r not in buckets:
            heapq.heappush(queue, r)
        buckets.setdefault(r, []).extend(places)

    for place in range(1, len(symbols) - 2):
        if (r := rank_at(place)) is not None:
            wait([place], r)
    while queue:
        lowest = heapq.heappop(queue)
        places = sorted(buckets.pop(lowest))
        for n, left in enumerate(places):
            if queue and queue[0] <= lowest:  # the last merge made way for one that comes first: a rare thing
                wait(places[n:], lowest)
                break
            if rank_at(left) != lowest:
                continue  # one of the two has been merged since
            right = after[left]
            symbols[left], symbols[right] = symbols[left] + symbols[right], None
            after[left] = after[right]
            before[after[right]] = left
            for place in (before[left], left):
                if (r := rank_at(place)) is not None:
                    wait([place], r)
    return [s for s in symbols if s is not None]


# ----------------------------------------------------------------------------------------------- added tokens


def check_characters(text):
    """Raise Invalid for half of a surrogate pair, which has no UTF-8, and for what nobody can speak."""
    if len(text) > LONGEST_SAID:
        raise Invalid(f"a text has {len(text)} characters, at most {LONGEST_SAID} are taken; is it the right "
                      "file? Cut a long text into sentences.")
    try:
        text.encode()
    except UnicodeEncodeError as e:
        code = f"U+{ord(text[e.start]):04X}"
        raise Invalid(f"character {e.start} of the text is {code}, half of a surrogate pair and no "
                      "character. Read the text in the encoding that it was written in.") from None


def check_ids(ids, rows, name):
    """Raise Invalid for an id that the model's table has no row for: on a GPU it would end the process."""
    if rows and ids and max(ids) >= rows:
        raise Invalid(f"{name} gives the id {max(ids)} for this text, and the model's table has {rows} rows. "
                      "Do tokenizer and weights come from the same checkpoint?")


def find_longest(texts):
    """A pattern that finds the leftmost of these texts, and the longest of those that begin there."""
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def cut(text, finder, tokens, special):
    """Cut added tokens out of text; yields (start, text, None) and (start, None, id) in turn."""
    done = 0
    for match in finder.finditer(text):
        token, (start, stop) = tokens[match[0]], match.span()
        if token["special"] and not special:
            continue
        before, behind = text[max(start - 1, 0):start], text[stop:stop + 1]
        if token["single_word"] and (in_word(before) or in_word(behind)):
            continue
        if token["lstrip"]:
            start = done + len(text[done:start].rstrip(WHITE))
        while token["rstrip"] and stop < len(text) and text[stop] in WHITE:
            stop += 1
        if done < start:
            yield done, text[done:start], None
        yield start, None, token["id"]
        done = stop
    if done < len(text):
        yield done, text[done:], None


def in_word(char):
    """What \\w means in Unicode's terms: Python's own takes superscripts and leaves out combining marks."""
    kind = unicodedata.category(char) if char else ""
    return kind[:1] in ("L", "M") or kind in ("Nd", "Nl", "Pc") or char in ("\u200c", "\u200d")


# ------------------------------------------------------------------------------------------------ decoding


def decode_step(step, tokens) -> list[str]:
    kind = step["type"]
    if kind == "ByteLevel":
        return [b"".join(map(bytes_of, tokens)).decode(errors="replace")]
    if kind == "ByteFallback":
        return join_bytes(tokens)
    if kind == "Metaspace":
        first = " " if step["prepend_scheme"] == "never" else ""
        return [t.replace(step["replacement"], " " if i else first) for i, t in enumerate(tokens)]
    if kind == "Replace":
        return [t.replace(step["pattern"]["String"], step["content"]) for t in tokens]
    if kind == "Fuse":
        return ["".join(tokens)]
    char = re.escape(step["content"])  # Strip: up to `start` of them in front, up to `stop` behind
    edges = re.compile(f"\\A{char}{{0,{step['start']}}}(.*?){char}{{0,{step['stop']}}}\\Z", re.DOTALL)
    return [edges.match(t)[1] for t in tokens]


def bytes_of(token):
    """A token with other characters than the 256 that stand for bytes, such as an added one, is text."""
    if all(char in CHAR_TO_BYTE for char in token):
        return bytes(CHAR_TO_BYTE[char] for char in token)
    return token.encode()


def join_bytes(tokens) -> list[str]:
    """Each run of <0x..> becomes one text, or one replacement mark per byte if the run is not UTF-8."""
    out, run = [], b""
    for t in [*tokens, None]:
        if t is not None and re.fullmatch("<0x[0-9A-Fa-f]{2}>", t):
            run += bytes.fromhex(t[3:5])
            continue
        try:
            out += [run.decode()] if run else []
        except UnicodeDecodeError:
            out += ["\ufffd"] * len(run)
        out += [] if t is None else [t]
        run = b""
    return out
