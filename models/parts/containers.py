"""Where the sound in a file really ends, told by its container: WAV, AIFF, AU, CAF, W64, Ogg, MP3, FLAC.

libsndfile believes headers. It reads the first half of a cut WAV or Ogg without a word, 2.5 of 12 seconds
of an MP3 without an index, the first of two joined recordings, nothing of a WAV whose size a pipe could not
know, and takes a FLAC of unknown length for 10^14 seconds. So the container is walked once: chunk by chunk,
page by page, frame by frame.

    sound = look("clip.mp3")
    sound.problem   "" or what is wrong, in words: the file ends early
    sound.parts     () where libsndfile may open the file itself, else the bytes to read instead, in order

Nothing is decoded here. Formats: RIFF and WAVE as in RFC 2361, RF64 as in EBU 3306, AIFF 1.3, Ogg as in
RFC 3533, MPEG audio as in ISO 11172-3 and 13818-3, FLAC as in RFC 9639.
"""
import functools
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from models.parts import Invalid

MOST_CHUNKS = 4096  # real files have a dozen; a hostile one could be all empty chunks, and take minutes
UNKNOWN = 0xFFFFFFFF  # of a size in 32 bits: written into a pipe, or kept elsewhere in the file
PIPE_SIZE = 0x7FFF0000  # who writes into a pipe cannot know the size and states about the most there is
MOST_BYTES = 2**31  # a file that must be mended is read whole; what is larger is named instead


@dataclass
class Sound:
    """What a container says of itself."""

    problem: str = ""  # why the sound is not whole; "" where it is
    parts: tuple = ()  # bytes of files to read instead, one after the other; () means the file as it is


def look(path) -> Sound:
    """Walk the container of a file; unknown formats are left to libsndfile. Invalid: it cannot be opened."""
    try:
        status = os.stat(path)
        return _look(str(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise Invalid(f"{path}: cannot be opened ({error.strerror})") from None


@functools.lru_cache(maxsize=16)  # a file is looked at for its length and again to be read
def _look(path, size, _changed):
    with open(path, "rb") as file:
        head = file.read(16)
        for recognizes, walk in WALKS:
            if recognizes(head):
                file.seek(0)
                return walk(file, size)
    if Path(path).suffix.lower() in (".mp3", ".mp2") or head[:3] == b"ID3" or _mpeg_header(head):
        return _mpeg(Path(path), size)
    return Sound()


def _cut(missing):
    return Sound(f"cut off: its header promises {missing} bytes more than the file has")


def _whole(file, size, why):
    """All bytes of a file that must be mended."""
    if size > MOST_BYTES:
        raise Invalid(f"{file.name}: {size} bytes, and {why}; convert it to FLAC or WAV first")
    file.seek(0)
    return bytearray(file.read())


# ------------------------------------------------------------------------------------------------ chunks


def _chunks(file, size, head, pad):
    """Walk chunks: yields (name, where its content begins, its length). head: struct of name and length."""
    for _ in range(MOST_CHUNKS):
        raw = file.read(struct.calcsize(head))
        if len(raw) < struct.calcsize(head):
            return
        name, length = struct.unpack(head, raw)
        begin = file.tell()
        yield name, begin, length
        if begin + length > size:
            return
        file.seek(begin + length + (length % 2 if pad else 0))
    raise Invalid(f"{file.name}: more than {MOST_CHUNKS} chunks; it is no sound file that can be read")


def _riff(file, size):
    """RIFF, RF64 and BW64: the data chunk must lie within the file."""
    stated = struct.unpack_from("<I", file.read(12).ljust(12, b"\0"), 4)[0]
    long = None  # RF64 keeps a size beyond 4 GB in a chunk of its own
    for name, begin, length in _chunks(file, size, "<4sI", pad=True):
        # A pipe leaves the size of the whole and of the data undone: one right size is a promise.
        if name == b"ds64":
            if length < 16:
                return Sound("damaged: its ds64 chunk is shorter than the sizes that it should hold")
            long = struct.unpack("<QQ", file.read(16).ljust(16, b"\0"))[1]
        if name != b"data":
            continue
        if length == UNKNOWN and long is not None:
            length = long
        if length == 0 and begin < size and stated + 8 != size:  # written into a pipe, and never corrected
            data = _whole(file, size, "its size is not stated")
            data[begin - 4 : begin] = struct.pack("<I", size - begin)
            return Sound(parts=(bytes(data),))
        if length == UNKNOWN or length >= PIPE_SIZE and size < PIPE_SIZE and stated + 8 != size:
            return Sound()
        return _cut(begin + length - size) if begin + length > size else Sound()
    return Sound("cut off within its header")


def _aiff(file, size):
    file.seek(12)
    for name, begin, length in _chunks(file, size, ">4sI", pad=True):
        if name == b"SSND":
            if length >= PIPE_SIZE and size < PIPE_SIZE:
                return Sound()
            return _cut(begin + length - size) if begin + length > size else Sound()
        if begin + length > size:
            break
    return Sound("cut off within its header")


def _au(file, size):
    _, begin, length = struct.unpack(">4sII", file.read(12).ljust(12, b"\0"))
    if length == UNKNOWN:  # allowed by the format: up to the end
        return Sound()
    return _cut(begin + length - size) if begin + length > size else Sound()


def _caf(file, size):
    """Apple's Core Audio Format. A data chunk of length -1 goes up to the end of the file."""
    file.seek(8)
    for name, begin, length in _chunks(file, size, ">4sq", pad=False):
        if name == b"data" and length == -1:
            return Sound()
        if length < 0:
            return Sound(f"damaged: one of its chunks has a length of {length} bytes")
        if begin + length > size:
            return _cut(begin + length - size)
    return Sound()


def _w64(file, size):
    """Sony's Wave64 states the length of the whole; libsndfile also reads what lies behind it."""
    file.seek(16)
    length = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))[0]
    if length > size:
        return _cut(length - size)
    if length == size:
        return Sound()
    data = _whole(file, size, "something lies behind its end")
    return Sound(parts=(bytes(data[:length]),))


# ------------------------------------------------------------------------------------------------ Ogg

# Capture pattern, version, flags, position, serial, sequence, checksum, number of segments.
OGG_HEAD = struct.Struct("<4sBBqIIIB")
BEGINS, ENDS = 2, 4  # flags of a page


def _ogg(file, size):
    """Walk the pages. Every stream must end with a page that says so; joined streams become one part each."""
    begins = []  # where each of the joined recordings begins
    open_streams = set()
    at = 0
    while at < size:
        file.seek(at)
        head = file.read(OGG_HEAD.size)
        if len(head) < OGG_HEAD.size or not head.startswith(b"OggS"):
            break  # the page before was the last one; what follows is no Ogg
        _, _, flags, _, serial, _, _, segments = OGG_HEAD.unpack(head)
        sizes = file.read(segments)
        end = at + OGG_HEAD.size + segments + sum(sizes)
        if end > size or len(sizes) < segments:
            return Sound("cut off: it ends within a page")
        if flags & BEGINS:
            if not open_streams:
                begins.append(at)
            open_streams.add(serial)
        if flags & ENDS:
            open_streams.discard(serial)
        at = end
    if open_streams:
        return Sound("cut off: no page ends the stream")
    if len(begins) < 2:
        return Sound()
    data = _whole(file, size, "several recordings are joined in it")
    return Sound(parts=tuple(bytes(data[a:b]) for a, b in zip(begins, [*begins[1:], at])))


# ------------------------------------------------------------------------------------------------ MP3

# Kilobits per second by (MPEG 1 or not, layer); index 0 of a header means free, 15 is forbidden.
BITRATES = {(True, 1): (32, 64, 96, 128, 160, 192, 224, 256, 288, 320, 352, 384, 416, 448),
            (True, 2): (32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384),
            (True, 3): (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
            (False, 1): (32, 48, 56, 64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256),
            (False, 2): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
            (False, 3): (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)}
RATES = {3: (44100, 48000, 32000), 2: (22050, 24000, 16000), 0: (11025, 12000, 8000)}  # by the version bits
ID3_SIZE = 10
VBRI_AT = 36  # Fraunhofer's index stands here whatever the header says


@dataclass
class MpegFrame:
    rate: int
    layer: int
    mpeg1: bool
    channels: int
    length: int  # bytes

    @property
    def index_at(self):
        """Where an Xing or Info index stands in the frame: behind the side information."""
        side = {(True, 2): 32, (True, 1): 17, (False, 2): 17, (False, 1): 9}
        return 4 + side[self.mpeg1, self.channels]


@functools.lru_cache(maxsize=4096)  # a file has few different headers, and many of them
def _mpeg_header(raw):
    """MpegFrame of four bytes; None: they are no header, or one of free bitrate, which cannot be walked."""
    if len(raw) < 4 or raw[0] != 0xFF or raw[1] & 0xE0 != 0xE0:
        return None
    version, layer = raw[1] >> 3 & 3, 4 - (raw[1] >> 1 & 3)
    bitrate, rate = raw[2] >> 4, raw[2] >> 2 & 3
    if version == 1 or layer == 4 or bitrate in (0, 15) or rate == 3:
        return None
    hertz, kilobits = RATES[version][rate], BITRATES[version == 3, layer][bitrate - 1]
    padding = raw[2] >> 1 & 1
    if layer == 1:
        length = (12000 * kilobits // hertz + padding) * 4
    else:
        samples = 1152 if version == 3 or layer == 2 else 576
        length = samples // 8 * 1000 * kilobits // hertz + padding
    return MpegFrame(hertz, layer, version == 3, 1 if raw[3] >> 6 == 3 else 2, length)


def _end_of_frames(data):
    """Where tags begin that stand behind the last frame."""
    end = len(data)
    if data[max(0, end - 128) :][:3] == b"TAG":  # ID3v1
        end -= 128
    footer = data[max(0, end - 32) : end]
    if footer[:8] == b"APETAGEX" and len(footer) == 32:
        length, _, flags = struct.unpack_from("<III", footer, 12)
        end -= min(end, length + (32 if flags >> 31 else 0))
    return end


def _mpeg(path, size):
    """Walk the frames. Where an index at the front counts them right, libsndfile reads the file as it is;
    without one, or where recordings are joined, it gets the same frames behind a new index."""
    if size > MOST_BYTES:
        return Sound()
    data = path.read_bytes()
    end, at = _end_of_frames(data), 0
    frames = []  # where each frame of sound begins, and its header
    first = None  # all other headers must be of its rate and layer
    stated = None  # frames that the first index promises
    while at < end:
        if data[at : at + 3] == b"ID3":
            at += ID3_SIZE + _syncsafe(data[at + 6 : at + 10])
            continue
        frame = _mpeg_header(data[at : at + 4])
        if frame is None or not _fits(frame, first):
            at = _next_frame(data, at + 1, first)
            continue
        if at + frame.length > end:
            return Sound("cut off: it ends within a frame") if frames else Sound()
        if not _is_index(data, at, frame):
            frames.append((at, frame))
        elif first is None:
            stated = _stated_frames(data, at, frame)
        first = first or frame
        at += frame.length
    if not frames:
        return Sound()  # free bitrate, or no MP3 at all: libsndfile says so
    if stated is not None and len(frames) < stated - 1:  # some encoders count the index itself
        return Sound(f"cut off: its index promises {stated} frames, the file has {len(frames)}")
    if stated == len(frames):
        return Sound()
    return Sound(parts=(_with_index(data, frames),))


def _fits(frame, first):
    return first is None or (frame.rate, frame.layer) == (first.rate, first.layer)


def _is_index(data, at, frame):
    """Whether a frame holds no sound but the index of a whole file."""
    if data[at + VBRI_AT : at + VBRI_AT + 4] == b"VBRI":
        return True
    return frame.layer == 3 and data[at + frame.index_at : at + frame.index_at + 4] in (b"Xing", b"Info")


def _syncsafe(raw):
    """An ID3v2 length: four bytes of seven bits."""
    return functools.reduce(lambda value, byte: value << 7 | byte & 0x7F, raw, 0)


def _next_frame(data, at, first):
    """Where the next header stands that another one follows, or the end."""
    for found in re.finditer(rb"\xff[\xe0-\xff]", data[at:]):
        begin = at + found.start()
        frame = _mpeg_header(data[begin : begin + 4])
        if frame is None or not _fits(frame, first):
            continue
        if _mpeg_header(data[begin + frame.length : begin + frame.length + 4]):
            return begin
    return len(data)


def _stated_frames(data, at, frame):
    """How many frames an index promises; None where it does not say."""
    if data[at + VBRI_AT : at + VBRI_AT + 4] == b"VBRI":
        return struct.unpack_from(">I", data, at + VBRI_AT + 14)[0]
    flags, count = struct.unpack_from(">II", data, at + frame.index_at + 4)
    return count if flags & 1 else None


def _with_index(data, frames):
    """The frames behind an Info index that counts them: what libsndfile needs to know the length."""
    first = frames[0][1]
    sound = b"".join(data[at : at + frame.length] for at, frame in frames)
    begin = frames[0][0]
    header = bytearray(data[begin : begin + 4])
    header[1] |= 1  # no checksum behind the header
    header[2] = header[2] & 0x0D | (9 << 4)  # a bitrate at which the frame has room for the index, no padding
    length = _mpeg_header(bytes(header)).length
    counts = struct.pack(">III", 3, len(frames), len(sound) + length)  # 3: frames and bytes are stated
    index = bytes(header).ljust(first.index_at, b"\0") + b"Info" + counts
    return index.ljust(length, b"\0") + sound


# ------------------------------------------------------------------------------------------------ FLAC

FLAC_BEGINS = b"fLaC[\x00\x80]\x00\x00\x22"  # marker, and the head of the block that must come first
TOTAL_AT = 21  # byte whose lower half begins the 36 bits of the total
BLOCK_SIZES = {1: 192, 2: 576, 3: 1152, 4: 2304, 5: 4608, **{code: 256 << code - 8 for code in range(8, 16)}}
TAIL = 2**21  # more than the longest frame, which is 65,535 samples of 8 channels in 32 bits


def _flac(file, size):
    """The last frame must end where the total says. Joined recordings become parts; a total of 0, as a pipe
    leaves it, is worked out from the last frame."""
    head = file.read(42)
    file.seek(max(0, size - TAIL))
    tail = file.read()
    if len(head) < 42:
        return Sound()  # no FLAC at all: libsndfile says so
    alone = not re.search(FLAC_BEGINS, tail[4:])
    total = _flac_total(head)
    if alone and total and any(end == total for end, _ in _flac_ends(head, tail)):
        return Sound()
    data = _whole(file, size, "its last frame does not end where its header says")
    begins = [m.start() for m in re.finditer(FLAC_BEGINS, data)]
    parts = [data[a:b] for a, b in zip(begins, [*begins[1:], len(data)])]
    for part in parts:
        ends = list(_flac_ends(part, part[-TAIL:]))
        whole = next((end for end, place in ends if _crc(part[place:], 16, 0x8005) == 0), None)
        total = _flac_total(part)
        last = max((end for end, _ in ends), default=0)
        if last < total:
            return Sound(f"cut off: it ends before sample {total}, which its header promises")
        if not total and whole is None:
            return Sound("cut off: its last frame is not whole")
        if not total:
            part[TOTAL_AT] |= whole >> 32
            part[TOTAL_AT + 1 : TOTAL_AT + 5] = struct.pack(">I", whole & 0xFFFFFFFF)
    return Sound(parts=tuple(bytes(p) for p in parts)) if len(parts) > 1 or not _flac_total(head) else Sound()


def _flac_total(head):
    return int.from_bytes(head[TOTAL_AT : TOTAL_AT + 5], "big") & 0xFFFFFFFFF


def _flac_ends(head, tail):
    """(sample at which it ends, place from the tail's end) of what looks like a frame, last first."""
    largest = struct.unpack_from(">H", head, 10)[0]
    at = len(tail)
    while (at := tail.rfind(b"\xff", 0, at)) >= 0:
        found = _flac_header(tail, at) if tail[at + 1 : at + 2] in (b"\xf8", b"\xf9") else None
        if found:
            number, samples = found
            # Blocks of one size are numbered; others say at which sample they begin.
            begin = number if tail[at + 1] == 0xF9 else number * largest
            yield begin + samples, at - len(tail)


def _flac_header(data, at):
    """(coded number, samples) of the frame header at a place; None: its checksum says that it is none."""
    if len(data) < at + 6:
        return None
    size_code, rate_code = data[at + 2] >> 4, data[at + 2] & 15
    number, behind = _coded_number(data, at + 4)
    if number is None:
        return None
    samples = BLOCK_SIZES.get(size_code)
    if size_code in (6, 7):  # written out behind the number
        width = size_code - 5
        samples = int.from_bytes(data[behind : behind + width], "big") + 1
        behind += width
    behind += {12: 1, 13: 2, 14: 2}.get(rate_code, 0)
    if samples is None or _crc(data[at : behind + 1], 8, 0x07):
        return None
    return number, samples


def _coded_number(data, at):
    """The number that FLAC writes as UTF-8 would, up to 36 bits. -> (number or None, where it ends)"""
    first = data[at]
    if first < 0x80:
        return first, at + 1
    ones = next((n for n in range(8) if not first & 0x80 >> n), 8)
    tail = data[at + 1 : at + ones]
    if not 2 <= ones <= 7 or any(byte & 0xC0 != 0x80 for byte in tail):
        return None, at
    number = first & (0x7F >> ones)
    for byte in tail:
        number = number << 6 | byte & 0x3F
    return number, at + ones


def _crc(data, bits, polynomial):
    """Remainder of a cyclic redundancy check, most significant bit first; 0 where data end with their own."""
    value, top, mask = 0, 1 << bits - 1, (1 << bits) - 1
    for byte in data:
        value ^= byte << bits - 8
        for _ in range(8):
            value = (value << 1 ^ polynomial if value & top else value << 1) & mask
    return value


WALKS = (
    (lambda head: head[:4] in (b"RIFF", b"RF64", b"BW64") and head[8:12] == b"WAVE", _riff),
    (lambda head: head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"), _aiff),
    (lambda head: head[:4] == b".snd", _au),
    (lambda head: head[:4] == b"caff", _caf),
    (lambda head: head[:16] == bytes.fromhex("726966662e91cf11a5d628db04c10000"), _w64),
    (lambda head: head[:4] == b"OggS", _ogg),
    (lambda head: head[:4] == b"fLaC", _flac),
)
