"""What a reader of containers gets wrong: each of these lets a cut or joined file pass."""
FILE, TESTS = "models/parts/containers.py", "tests/test_containers.py"

MUTANTS = [(item, FILE, old, new, TESTS) for item, old, new in (
    ("cut WAV", "return _cut(begin + length - size) if begin + length > size else Sound()\n    return Sound(\"cut off within its header\")\n\n\ndef _aiff",
     "return Sound()\n    return Sound(\"cut off within its header\")\n\n\ndef _aiff"),
    ("odd chunks", "(length % 2 if pad else 0)", "0"),
    ("chunks without end", "for _ in range(MOST_CHUNKS):", "while True:"),
    ("a pipe's zero", "if length == 0 and begin < size and stated + 8 != size:", "if False:"),
    ("an empty WAV is a pipe", "and begin < size and stated + 8 != size:", "and begin < size:"),
    ("a pipe's most", "if length == UNKNOWN or length >= PIPE_SIZE and size < PIPE_SIZE and stated + 8 != size:", "if False:"),
    ("cut AIFF", 'if name == b"SSND":', 'if name == b"none":'),
    ("W64 with a tail", "return Sound(parts=(bytes(data[:length]),))", "return Sound()"),
    ("Ogg without an end", "if open_streams:", "if False:"),
    ("Ogg cut in a page", "if end > size or len(sizes) < segments:", "if False:"),
    ("chained Ogg", "if len(begins) < 2:", "if True:"),
    ("MP3 cut in a frame", 'return Sound("cut off: it ends within a frame") if frames else Sound()', "break"),
    ("MP3 without an index", "return Sound(parts=(_with_index(data, frames),))", "return Sound()"),
    ("MP3 tags", 'if data[max(0, end - 128) :][:3] == b"TAG":', "if False:"),
    ("MP3 tag in front", "at += ID3_SIZE + _syncsafe(data[at + 6 : at + 10])", "at += ID3_SIZE"),
    ("FLAC joined", "alone = not re.search(FLAC_BEGINS, tail[4:])", "alone = True"),
    ("FLAC of unknown length", "if not total:\n            part[TOTAL_AT]", "if False:\n            part[TOTAL_AT]"),
    ("FLAC header unchecked", "if samples is None or _crc(data[at : behind + 1], 8, 0x07):", "if samples is None:"),
    ("FLAC number of two bytes", "number = number << 6 | byte & 0x3F", "number = number << 7 | byte & 0x3F"),
)]
