"""Cut a long text where a speaker would breathe: between sentences, else between clauses, else between words.

    pieces("Dr. Lee paid 3.50. \\"Really?\\" Yes.", 20)   # ['Dr. Lee paid 3.50. ', '"Really?" Yes.']

Nothing is lost or changed: joined, the pieces are the text. Marks are those of the scripts that speech models
read; a full stop in an abbreviation, an initial or a number ends nothing.
"""
import re
import unicodedata

from models.parts import Invalid

# Marks that end a sentence wherever they stand: Chinese and Japanese, Devanagari, Armenian, Ethiopic,
# Burmese, Khmer, Tibetan, and the Arabic and Urdu ones, which no number holds.
STRONG = "。｡！？…‥।॥։።፧፨၊။។៕།༎؟۔"
PLAIN = ".!?"  # these need a blank or the end of the text behind them
CLAUSE = r"[,;:—–](?=\s)|[，、；：،؛]"  # a regex: Latin ones need a blank behind them, as in 1,000
CLOSING = "\"'”’»›)]}」』】〉》）］"  # belong to the sentence before them

# Words that take a full stop and go on, in lower case: English, German, French, Spanish, Portuguese, Italian.
ABBREVIATIONS = set("""
mr mrs ms dr prof rev hon st jr gen col capt lt sgt gov sen rep vs etc eq ed eds al inc ltd co corp dept
approx ca cf jan feb apr jun jul aug sep sept oct nov a.m p.m e.g i.e u.s u.k hr fr bzw z.b d.h u.a usw str
tel mme mlle mm sra srta ud uds av avda sig dott ing
""".split())
# The same, before a number only.
NUMBERED = {"no", "nos", "nr", "vol", "fig", "figs", "p", "pp", "art", "sec", "ch"}


def _is_end(text, at):
    """Whether the mark at a place ends a sentence."""
    mark = text[at]
    if mark in STRONG or mark == "\n":
        return True
    if mark not in PLAIN:
        return False
    behind = text[at + 1 :].lstrip(PLAIN + CLOSING)[:1]
    if behind and not behind.isspace():
        return False
    if mark != ".":
        return True
    word = re.search(r"[^\s(\[\"'“‘«„]*$", text[max(0, at - 20) : at])[0].lower()
    follows = re.match(r"[.\"'”’»)\]\s]*(.?)", text[at + 1 : at + 40], re.S)[1]
    if follows and (word in ABBREVIATIONS or word in NUMBERED and follows.isdigit()):
        return False
    initial = len(word) == 1 and word.isalpha()  # J. R. R. Tolkien
    return not (initial and follows) and not follows.islower()


def sentences(text):
    """The text as a list of sentences, each with its closing quotes and the blanks behind it."""
    out, begin, at = [], 0, 0
    while at < len(text):
        if not _is_end(text, at):
            at += 1
            continue
        while at < len(text) and text[at] in PLAIN + STRONG + CLOSING:  # "Really?!" ends once
            at += 1
        while at < len(text) and text[at].isspace():
            at += 1
        out.append(text[begin:at])
        begin = at
    return out + [text[begin:]] if begin < len(text) else out


def _cut(sentence, most):
    """A sentence that is too long: at the last clause mark that fits, else the last blank, else anywhere."""
    out = []
    while len(sentence) > most:
        head = sentence[:most]
        marks = [match.end() for match in re.finditer(CLAUSE, head)]
        blanks = [match.end() for match in re.finditer(r"\s", head)]
        at = next((places[-1] for places in (marks, blanks) if places), most)
        while 1 < at < len(sentence) and unicodedata.combining(sentence[at]):
            at -= 1  # an accent stays with its letter
        out.append(sentence[:at])
        sentence = sentence[at:]
    return out + [sentence] if sentence else out


def _has_words(piece):
    return any(character.isalnum() for character in piece)


def pieces(text, most):
    """The text in as few pieces of at most `most` characters as whole sentences allow."""
    if most < 1:
        raise Invalid(f"max_chars_per_piece is {most}, expected at least 1")
    out = []
    for sentence in sentences(text):
        for part in _cut(sentence, most):
            if out and len(out[-1]) + len(part) <= most and part is sentence:
                out[-1] += part
            else:
                out.append(part)
    spoken = []  # blanks or marks alone are nothing to say: they stay with the piece before, the first behind
    for piece in out:
        if spoken and not (_has_words(piece) and _has_words(spoken[-1])):
            spoken[-1] += piece
        else:
            spoken.append(piece)
    return spoken
