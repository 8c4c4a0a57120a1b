"""Text files as they lie on people's disks: encodings, line ends, JSON, and what only looks like a text file.

    for number, line in lines("metadata.csv"): ...    # no BOM, no line ends, no blank lines
    one_line(" What is\\r\\nsaid.\\n")                      # "What is  said.", as every script reads it
"""
import json
import os
import re
import unicodedata
from pathlib import Path

from models.parts import Invalid, plain

BOM = b"\xef\xbb\xbf"
UTF16 = (b"\xff\xfe", b"\xfe\xff")
# What tables and models come in that is no text: the first bytes of a file, what it is, and the way out.
FOREIGN = (
    (b"PAR1", "Parquet", "export it as JSONL, such as with pandas' to_json(orient='records', lines=True), "
                         "and its audio as files"),
    (b"ARROW1", "Arrow", "export it as JSONL, and its audio as files"),
    (b"PK\x03\x04", "a zip archive or a spreadsheet", "unpack it, or save the sheet as CSV in UTF-8"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it first"),
    (b"\xd0\xcf\x11\xe0", "an old spreadsheet", "save it as CSV in UTF-8"),
)


def refuse_utf16(path, data):
    if data.startswith(UTF16):
        raise Invalid(f"{path} is UTF-16; save it as UTF-8")


def refuse_foreign(path):
    """Invalid for a file that is no text, with what it is."""
    with open(path, "rb") as f:
        begin = f.read(32)
    plain.refuse_pointer(path, begin)
    for magic, what, way_out in FOREIGN:
        if begin.startswith(magic):
            raise Invalid(f"{path} is {what}: {way_out}")


def read_text(path):
    """A text file without BOM; bytes that are no UTF-8 become surrogates, which check_text names."""
    data = Path(path).read_bytes().removeprefix(BOM)
    refuse_utf16(path, data)
    return data.decode("utf-8", "surrogateescape")


def lines(path):
    """(number, line) without BOM, line ends and blank lines; one line is in memory at a time."""
    with open(path, "rb") as f:
        for n, line in enumerate(f, 1):
            if n == 1:
                line = line.removeprefix(BOM)
                refuse_utf16(path, line)
            if line.strip():
                yield n, line.rstrip(b"\r\n").decode("utf-8", "surrogateescape")


def parse(text):
    """JSON, or an Invalid that says where it ends being JSON."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        return Invalid(f"not valid JSON: {e.msg} at column {e.colno}")
    except (RecursionError, ValueError) as e:
        return Invalid(f"not valid JSON: {e}")


def one_line(text):
    """A text as it is trained on and spoken: one line, without BOM, control characters and outer blanks.

    Letters stay as they were typed: which of two ways to write an accent a tokenizer saw in training differs
    from one to the other, so only prepare_data.py chooses one (NFC), and writes it down.
    """
    spaced = "".join(" " if c.isspace() else c for c in text.replace("\ufeff", ""))
    return "".join(c for c in spaced if not is_control(c)).strip()


def refuse_blank(text):
    """Invalid for a text that holds nothing to say."""
    if not one_line(text):
        raise Invalid(f"text {shown(text)} is empty")


def is_control(character):
    return unicodedata.category(character) == "Cc" and not character.isspace()


def is_file(path):
    try:
        return os.path.isfile(path)
    except (OSError, ValueError):  # no name that a file could have
        return False


def shown(value):
    """A value for a message, as Python writes it."""
    return plain.shown(plain.written(value))


def check_text(text, key):
    if not isinstance(text, str):
        raise Invalid(f"{key} must be text, got {shown(text)}")
    if not text.strip():
        raise Invalid(f"{key} is empty")
    bad = re.search("[\ud800-\udfff]", text)
    if bad:
        code = ord(bad[0])
        what = f"a lone surrogate U+{code:04X}"
        if 0xDC80 <= code <= 0xDCFF:  # what lines() made of a byte
            what = f"the byte 0x{code - 0xDC00:02x}, which is not UTF-8"
        raise Invalid(f"{key} holds {what}, at character {bad.start() + 1}; save the file as UTF-8")
