"""Text front end for Chinese and English: few marks, one spelling of pinyin, characters apart, upper case.

    "它xuan4,it's 好" ─marks, contractions, pinyin─▶ "它XVAN4,it is 好" ─apart─▶ "它 XVAN4,IT IS 好"
    its pieces ─at commas, dashes and sentence ends, neighbours joined again─▶ segments of `most` at most

What IndexTTS2 does around its normaliser. Numbers, dates and units are not spelled out here: that needs a
grammar of the language, which a function of the user's choice brings when the data is prepared.
"""
import re
import warnings

# Every mark that the vocabulary lacks, as the nearest one that it has.
MARKS = {"：": ",", "；": ",", ";": ",", "，": ",", "。": ".", "！": "!", "？": "?", "\n": " ", "·": "-", "、": ",",
         "...": "…", ",,,": "…", "，，，": "…", "……": "…", "“": "'", "”": "'", '"': "'", "‘": "'", "’": "'",
         "（": "'", "）": "'", "(": "'", ")": "'", "《": "'", "》": "'", "【": "'", "】": "'", "[": "'", "]": "'",
         "—": "-", "～": "-", "~": "-", "「": "'", "」": "'", ":": ","}
CHINESE_MARKS = {"$": ".", **MARKS}
CONTRACTION = re.compile(r"(what|where|who|which|how|t?here|it|s?he|that|this)'s", re.IGNORECASE)
SYLLABLE = (r"(?:[bpmfdtnlgkhjqxzcsryw]|[zcs]h)?"
            r"(?:[aeiouüv]|[ae]i|u[aio]|ao|ou|i[aue]|[uüv]e|[uvü]ang?|uai|[aeiuv]n|[aeio]ng|ia[no]|i[ao]ng)"
            r"|ng|er")
PINYIN = re.compile(rf"(?<![a-z])(?:{SYLLABLE})[1-5]", re.IGNORECASE)  # xuan4, zhong4; not beta1
UMLAUT = re.compile(r"([jqx])[uü](n|e|an)*(\d)", re.IGNORECASE)  # written u behind these three, spoken ü
EMAIL = re.compile(r"[a-zA-Z0-9]+@[a-zA-Z0-9]+\.[a-zA-Z]+$")
SAID = re.compile(r"<[^|>\n]+\|[^>\n]+>")  # <word|how it is said>: kept as it stands
CJK = re.compile("([\u1100-\u11ff\u2e80-\ua4cf\ua840-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff65-\uffdc"
                 "\U00020000-\U0002ffff])")

COMMAS, DASHES, ENDS = (",", "▁,"), ("-",), (".", "!", "?", "▁.", "▁?", "▁...")
QUOTES = ("'", "▁'")


def is_chinese(text):
    """Whether the rules for Chinese hold: ideographs, no Latin letter, an e-mail address, or pinyin."""
    ideograph = re.search("[\u4e00-\u9fff]", text)
    latin = re.search("[a-zA-Z]", text)
    return bool(ideograph or not latin or EMAIL.match(text) or PINYIN.search(text))


def tone(syllable):
    """ju2 as JV2, que4 as QVE4; what does not begin with j, q or x stays."""
    if syllable[0] not in "jqxJQX":
        return syllable
    return UMLAUT.sub(r"\1v\2\3", syllable).upper()


def replace_marks(text, marks):
    pattern = "|".join(map(re.escape, marks))  # in the order of the table: "，" wins over "，，，"
    return re.sub(pattern, lambda m: marks[m[0]], text)


def replace_terms(text, terms, language):
    """A glossary {term: reading, or {language: reading}}, longest term first, whatever the case."""
    for term in sorted(terms, key=len, reverse=True):
        reading = terms[term]
        if isinstance(reading, dict):
            reading = reading.get(language, term)
        text = re.sub(re.escape(term), lambda m: reading, text, flags=re.IGNORECASE)
    return text


def normalize(text, terms=None):
    """Few marks, "it's" as "it is", pinyin in one spelling."""
    chinese = is_chinese(SAID.sub("P", text))
    parts = []
    done = 0
    for kept in [*SAID.finditer(text), None]:
        part = text[done : kept.start() if kept else len(text)]
        part = CONTRACTION.sub(r"\1 is", part)
        part = replace_terms(part, terms or {}, "zh" if chinese else "en")
        if chinese:
            part = PINYIN.sub(lambda m: tone(m[0]), part)
        parts.append(replace_marks(part, CHINESE_MARKS if chinese else MARKS))
        if kept:
            parts.append(kept[0])
            done = kept.end()
    return "".join(parts)


def apart(text):
    """Each CJK character alone, everything in upper case, single spaces between."""
    words = [word.strip().upper() for word in CJK.split(text.strip())]
    return " ".join(word for word in words if word)


def prepare(text, terms=None):
    """What SentencePiece is given. A single character passes as it is, even in lower case: as trained."""
    if len(text.strip()) == 1:
        return text
    return apart(normalize(text, terms))


# ------------------------------------------------------------------------------------------------ segments


def split(pieces, marks, most):
    """Segments of pieces, cut behind `marks`. One that holds a comma, or else a dash, is cut there, too."""
    segments, current = [], []
    for i, piece in enumerate(pieces):
        current.append(piece)
        following = pieces[i + 1] if i + 1 < len(pieces) else None
        if marks != COMMAS and any(comma in current for comma in COMMAS):
            segments += split(current, COMMAS, most)
        elif marks != DASHES and "-" in current:
            segments += split(current, DASHES, most)
        elif len(current) > most:
            segments += [current[j : j + most] for j in range(0, len(current), most)]
            warnings.warn(f"a sentence of over {most} pieces has no mark to cut it at; cut in the middle")
        elif piece in marks and len(current) > 2:
            # The original's slip, kept since everybody speaks with it: a quote behind the mark closes this
            # segment and opens the next one as well.
            segments.append([*current, following] if following in QUOTES else current)
        else:
            continue
        current = []
    if current:
        segments.append(current)
    return joined(segments, most)


def joined(segments, most):
    """Neighbours put together again as long as they have `most` pieces at most."""
    out = []
    for segment in segments:
        if out and len(out[-1]) + len(segment) <= most:
            out[-1] = out[-1] + segment
        elif segment:
            out.append(segment)
    return out


def segments(pieces, most):
    return split(pieces, ENDS, most)
