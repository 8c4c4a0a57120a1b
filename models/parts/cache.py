"""What the frozen codec made of each clip, on disk: encoded once, found again for ever.

    cache = ClipCache("data/cache", model)
    cache.add(rows)                         # encodes what is missing; a kill loses seconds
    example = cache.get(rows[0])            # {name: CPU tensor}, as windows into the files

Rows are those of models.parts.manifests. The model offers encode, encode_audio, encode_key, codec_key and
sample_rate; and encode_audio_batch, several waves in and as many codec outputs out, where its codec can take
more than one at a time.
"""
import copy
import hashlib
import json
import os
import re
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import safetensors
import safetensors.torch
import torch

from models.parts import Invalid, audio
from models.parts.clips import hash_file
from models.parts.manifests import CUT, FEATURES, Fault, Place, for_encode, holders, listing, voices
from models.parts.plain import parse, shown, sweep_one, write_file

# A shard is written when it has one of these: little is lost by a kill, and the files stay few.
SHARD_BYTES = 64 << 20
SHARD_SECONDS = 20  # since the last one
SHARD_RECORDS = 4096
# Audio in one pass of the codec, padding included. On a CPU several clips at once take longer than one after
# the other, since their layers do not fit into its caches; there, each thread takes a clip of its own.
BATCH_SECONDS = {"cpu": 0, "cuda": 120}
# Audio in the passes of all threads: a second takes some 6 MB in each layer (24 kHz, 64 channels).
MEMORY_SECONDS = 240
SAY_SECONDS = 5  # between two lines of progress
MOST_GAIN = 1e3  # dB: makes any wave infinite, which is refused, and is no power that Python cannot compute
HASH_DIGITS = 32  # of 64: 128 bits never meet by accident
SHARD_DIGITS = 12  # of those, in the name of a shard: enough to show damage
# The only names that are read, written or deleted in the folder: somebody else's files may lie beside them.
SHARD_NAME = rf"(\d{{5,}})-([0-9a-f]{{{SHARD_DIGITS}}})\.safetensors"
MEMOS = {"files.json": 3, "shards.json": 2}  # how many values an entry has


# ------------------------------------------------------------------------------------------- files and hashes


def stamp(path):
    """Size and time of change: while both stay, a file is taken to be the same."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns]


def read_memo(path):
    """A JSON object, or an empty one where there is none: a memo only saves time."""
    try:
        memo = parse(Path(path).read_bytes(), path) if Path(path).is_file() else {}
    except (OSError, Invalid):
        return {}
    return memo if isinstance(memo, dict) else {}


def sha(*parts):
    digest = hashlib.sha256()
    for part in parts:
        data = part if isinstance(part, memoryview) else str(part).encode("utf-8", "surrogatepass")
        digest.update(data)
    return digest.hexdigest()[:HASH_DIGITS]


def hash_of(flat):
    """The name that a flat tensor is stored under."""
    if not flat.numel():
        return sha(flat.dtype)
    return sha(flat.dtype, memoryview(flat.contiguous().view(torch.uint8).numpy()))


def clock(seconds):
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


class Progress:
    """When a line is due: every few seconds, and at the end."""

    def __init__(self, count):
        self.count, self.done = count, 0
        self.seconds = 0.0  # of audio
        self.begin = self.last = time.time()

    def due(self, seconds):
        """One more is done, that holds so many seconds of audio. -> whether a line is due"""
        self.done += 1
        self.seconds += seconds
        now = time.time()
        if self.done < self.count and now - self.last <= SAY_SECONDS:
            return False
        self.last = now
        return True

    @property
    def elapsed(self):
        return max(self.last - self.begin, 1e-9)


# ------------------------------------------------------------------------------------------------ the cache

# What reading a file that is no shard may raise.
BROKEN = (ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError)


def shard_number(path):
    return int(re.fullmatch(SHARD_NAME, path.name)[1])


def read_header(shard):
    """The JSON in front of the tensors. Its length is believed only if the file is that long."""
    status = os.stat(shard)
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for ever
        raise ValueError("no file")
    with open(shard, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if length > status.st_size:
            raise ValueError("damaged")
        return parse(f.read(length), shard)


def is_record(record):
    """Whether it is {name: [tensor, shape]}."""
    return all(isinstance(tensor, str) and isinstance(shape, list) for tensor, shape in record.values())


class Sound(NamedTuple):
    """What the codec is given: a file, or its part from start to end, made louder by gain_db."""

    path: str
    start: float | None
    end: float | None
    gain_db: float | None


class Plan(NamedTuple):
    """How the example of a row is made."""

    key: str  # of the example
    sounds: dict[str, Sound]  # by the key of what the codec makes of them
    row: dict  # what encode reads, with those keys in place of the paths


class Shard:
    """Records and tensors on their way into one file."""

    def __init__(self):
        self.records, self.tensors = {}, {}
        self.bytes, self.begin = 0, time.time()

    def put(self, key, output, stored):
        """Take one record, and those of its tensors whose hashes are neither in `stored` nor here."""
        record = {}
        for name, tensor in output.items():
            flat = tensor.detach().to("cpu").reshape(-1)
            digest = hash_of(flat)
            record[name] = [digest, list(tensor.shape)]
            if digest not in stored and digest not in self.tensors:
                self.tensors[digest] = flat.clone()
                self.bytes += flat.nbytes
        self.records[key] = record  # whole, since a signal may send what is here to the disk at any line

    @property
    def full(self):
        late = time.time() - self.begin > SHARD_SECONDS
        return late or len(self.records) >= SHARD_RECORDS or self.bytes > SHARD_BYTES


class ClipCache:
    """What `encode` made of each row, in safetensors shards in one folder, for any checkpoints and manifests.

    A tensor is stored flat under the hash of its bytes, so that equal tensors are stored once and damage
    shows. The header of a shard holds the records: key -> {name: [tensor, shape]}. There are two kinds of
    key. The codec's output hangs on the bytes of the sound file, the cut, the gain and model.codec_key; an
    example on every other key that encode reads, and on model.encode_key: a corrected transcript does not run
    the codec again.
    """

    def __init__(self, folder, model):
        self.folder, self.model = Path(folder), model
        self.records, self.shard_of = {}, {}  # key -> record, tensor -> file
        self.handles, self.whole_tensors = {}, set()  # open shards, and tensors whose hashes were right
        self.proven = set()  # shards whose records are those that their name promises
        self.bad = []  # shards of ours that are damaged; they go when their rows are encoded again
        self.strange = {}  # {file: why it is neither read nor touched, although its name is one of ours}
        self.failed = {}  # names of rows that the model refuses, and why
        # path -> [size, time, hash]: saves reading the files again
        self.memo = self._read_memo("files.json")
        # shard -> [size, time] at which all of its hashes were right; null: to be looked at
        whole = self._read_memo("shards.json")
        for shard in self._shards():
            try:
                self._open(shard, whole.get(shard.name))
            except OSError as e:  # says nothing of what lies there
                self.strange[shard] = e.strerror or str(e)
            except BROKEN:
                self._judge(shard, whole)
        self.records = {key: record for key, record in self.records.items() if self._is_whole(record)}

    def _shards(self):
        """Files that are named as we name shards, in the order in which they were written."""
        files = sorted(self.folder.glob("*.safetensors"))
        return [path for path in files if re.fullmatch(SHARD_NAME, path.name)]

    def _judge(self, shard, whole):
        """What is broken is ours if we wrote down that we made it, or its records are those of its name."""
        if shard.name in whole or shard in self.proven:
            self.bad.append(shard)
        else:
            self.strange[shard] = "it is no shard of this cache"

    def _read_memo(self, name):
        """The memo of that name, if it has the form of ours: another file of that name is somebody else's."""
        path = self.folder / name
        memo = read_memo(path)
        entries = [entry for entry in memo.values() if entry is not None]
        ours = all(isinstance(entry, list) and len(entry) == MEMOS[name] for entry in entries)
        if path.exists() and not (memo and ours):
            self.strange[path] = "it is no memo of this cache"
        return memo if ours else {}

    def _is_whole(self, record):
        """A shard that is lost or damaged takes tensors with it that records of other shards name."""
        return bool(record) and all(tensor in self.shard_of for tensor, _ in record.values())

    def _open(self, shard, whole):
        now = stamp(shard)
        header = read_header(shard)
        records = header.pop("__metadata__")["records"]
        if sha(records)[:SHARD_DIGITS] != re.fullmatch(SHARD_NAME, shard.name)[2]:
            raise ValueError("damaged")
        self.proven.add(shard)
        records = parse(records, shard)
        if not all(map(is_record, records.values())):
            raise ValueError("damaged")
        if whole != now:  # copied, restored or touched since it was written
            tensors = safetensors.torch.load_file(shard)
            if any(hash_of(tensor) != name for name, tensor in tensors.items()):
                raise ValueError("damaged")
            self._remember(shard)
        self.shard_of.update(dict.fromkeys(header, shard))
        self.records.update(records)

    def _remember(self, shard):
        self._note("shards.json", self._read_memo("shards.json") | {shard.name: stamp(shard)})

    def _doubt(self, shard):
        """Let the next start look at every byte of a shard; that we made it stays written down."""
        self._note("shards.json", self._read_memo("shards.json") | {shard.name: None})

    def _note(self, name, memo):
        if self.folder / name in self.strange:
            return
        try:
            write_file(self.folder / name, json.dumps(memo).encode("utf-8", "surrogatepass"))
        except Invalid:  # a cache that may only be read is still a cache
            pass

    # ---- keys

    def _hash(self, path):
        try:
            now = stamp(path)
            if self.memo.get(path, ())[:2] != now:
                self.memo[path] = [*now, hash_file(path)]
        except OSError as e:
            raise Invalid(f"{path} cannot be read: {e.strerror}") from None
        return self.memo[path][2]

    def _sound_key(self, sound):
        cut = json.dumps([sound.start, sound.end, sound.gain_db])
        return sha("codec", self._hash(sound.path), cut, self.model.codec_key)

    def _plan(self, row):
        row = copy.deepcopy(for_encode(row))
        for voice in voices(row):
            if "speaker_id" in voice:  # the number that stands for the name
                voice["speaker"] = voice.pop("speaker_id")
        features = [key for key in FEATURES if key in row]
        if features:  # the clip was encoded elsewhere, so nobody listens to it
            row.pop("audio", None)
        recording, recording_cut = row.get("audio"), [row.get(key) for key in CUT]
        sounds = {}
        for holder in holders(row):
            cut = [holder.pop(key, None) for key in CUT]
            if holder.get("type") == "audio" and holder["audio"] == recording:
                cut = recording_cut  # a message repeats the recording of its row
            for name, part in (("audio", cut), ("ref_audio", [None] * len(CUT))):
                if name in holder:
                    sound = Sound(holder[name], *part)
                    holder[name] = self._sound_key(sound)
                    sounds[holder[name]] = sound
        content = dict(row)
        for name in ("emotion", *features):
            if isinstance(row.get(name), str):  # a file counts by its bytes
                content[name] = self._hash(row[name])
        key = sha("example", self.model.encode_key, json.dumps(content, sort_keys=True))
        return Plan(key, sounds, row)

    # ---- reading

    def missing(self, rows) -> list[int]:
        """Which rows have no example yet. Reads sound files only where their size or time is new."""
        before = len(self.memo)
        numbers = [i for i, row in enumerate(rows) if self._plan(row).key not in self.records]
        if len(self.memo) != before:
            self._note("files.json", self.memo)
        return numbers

    def get(self, row) -> dict[str, torch.Tensor]:
        """The example of a row, as windows into the shard."""
        return self.load(self.key(row))

    def key(self, row) -> str:
        """What `load` finds the example of a row by; with it, the row's files are not looked at any more."""
        key = self._plan(row).key
        if key not in self.records:
            raise Invalid(f"{name_of(row)} is not in {self.folder}; run prepare_data.py for this checkpoint")
        return key

    def make(self, row) -> dict[str, torch.Tensor]:
        """The example of a row whose recordings are here, made anew: it is not stored, no codec runs."""
        return self._example(self._plan(row))

    def load(self, key):
        example = {}
        for name, (tensor, shape) in self.records[key].items():
            shard = self.shard_of[tensor]
            try:
                if shard not in self.handles:
                    self.handles[shard] = safetensors.safe_open(shard, "pt")
                flat = self.handles[shard].get_tensor(tensor)
            except (OSError, safetensors.SafetensorError) as e:
                self._doubt(shard)
                raise Invalid(f"{shard} cannot be read ({e}); run prepare_data.py again") from None
            if tensor not in self.whole_tensors:  # looked at once per process
                self._check(flat, tensor, shard)
            example[name] = flat.view(shape)
        return example

    def _check(self, flat, tensor, shard):
        if hash_of(flat) != tensor:
            self._doubt(shard)
            raise Invalid(f"{shard} is damaged; run the same command again, "
                          "and its rows will be encoded again")
        self.whole_tensors.add(tensor)

    # ---- encoding

    def add(self, rows, say=print) -> None:
        """Encode the rows that are missing, and only the audio that is new, saying how far it is."""
        self._sweep()
        if self.bad:
            names = ", ".join(shard.name for shard in self.bad[:3])
            say(f"{len(self.bad)} damaged shards in {self.folder} ({names}): encoding their rows again")
        for path, why in self.strange.items():
            say(f"{path} is left alone: {why}")
        plans, sounds = {}, {}
        names = {}  # by the key of the example
        for row in rows:
            plan = self._plan(row)
            if plan.key not in self.records and plan.key not in plans:
                plans[plan.key], names[plan.key] = plan, name_of(row)
                sounds |= {key: sound for key, sound in plan.sounds.items() if key not in self.records}
        if plans:
            self._refuse_unwritable(len(plans))
        self._note("files.json", self.memo)
        failed = self._encode_sounds(sounds, say)
        ready = [[key] for key, plan in plans.items() if self.records.keys() >= plan.sounds.keys()]
        failed |= self._work("rows", ready, lambda group: [attempt(self._example, plans[group[0]])], {}, say)
        for shard in self.bad:
            shard.unlink(missing_ok=True)
        self.bad = []
        self.failed = {}
        for key, plan in plans.items():
            for part in (*plan.sounds, key):
                if part in failed:
                    self.failed[names[key]] = str(failed[part])
        self._refuse_failed()

    def _refuse_unwritable(self, count):
        """Told before the codec has run for an hour: a data set may lie where nobody writes."""
        probe = self.folder / ".writable"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as e:
            raise Invalid(f"{self.folder} cannot be written ({e.strerror}), and {count} rows are not encoded "
                          "yet. Free space, or give train.py another folder as --cache_dir.") from None

    def _sweep(self):
        """Delete what a killed process was writing, if it is named as we name that."""
        for temporary in self.folder.glob(".*.tmp"):
            sweep_one(temporary, rf"(?:{SHARD_NAME}|files\.json|shards\.json)")

    def _refuse_failed(self):
        """Name each reason once, with the first row that has it."""
        names = {}
        for name, reason in self.failed.items():
            names.setdefault(reason, []).append(name)
        faults = []
        for reason, (first, *others) in names.items():
            more = f" and {len(others)} more rows" if others else ""
            faults.append(Fault(Place(first + more), reason))
        if faults:
            raise Invalid(listing(faults))

    def _encode_sounds(self, sounds, say):
        """Run the codec. -> {key: Invalid} of what it refuses"""
        length = {}
        for key, sound in sounds.items():
            end = audio.info(sound.path).seconds if sound.end is None else sound.end
            length[key] = end - (sound.start or 0)
        longest_first = sorted(sounds, key=length.get, reverse=True)  # too little memory shows at once
        groups = self._groups(longest_first, length)

        def run(group):
            return self._codecs([sounds[key] for key in group])

        return self._work("clips", groups, run, length, say)

    def _groups(self, longest_first, length):
        """Clips that share a pass of the codec: neighbours in length, bounded by their padded seconds."""
        device = next((p.device.type for p in self.model.codec.parameters()), "cpu")
        most = BATCH_SECONDS.get(device, 0) if hasattr(self.model, "encode_audio_batch") else 0
        groups = []
        for key in longest_first:
            if groups and length[groups[-1][0]] * (len(groups[-1]) + 1) <= most:
                groups[-1].append(key)
            else:
                groups.append([key])
        return groups

    def _codecs(self, sounds):
        """What the codec makes of each sound, or the Invalid that says what is wrong with that one."""
        if len(sounds) > 1:
            try:
                with torch.inference_mode():
                    outputs = self.model.encode_audio_batch([self._wave(sound) for sound in sounds])
                return [as_record(output) for output in outputs]
            except Invalid:  # one of them; alone, each answers for itself
                pass
        return [attempt(self._codec, sound) for sound in sounds]

    def _wave(self, sound):
        wave = audio.read(sound.path, self.model.sample_rate, sound.start, sound.end)[0]
        if sound.gain_db is not None:
            wave = wave * 10 ** (min(sound.gain_db, MOST_GAIN) / 20)
        if not wave.isfinite().all():
            raise Invalid(f"{sound.path}: gain_db {sound.gain_db} makes it louder than a number can be")
        return wave

    def _codec(self, sound):
        with torch.inference_mode():
            if sound.gain_db is None:
                return as_record(self.model.encode_audio(sound.path, sound.start, sound.end))
            return as_record(self.model.encode_audio(self._wave(sound)))

    def _example(self, plan):
        codes = {}
        for key in plan.sounds:
            record = self.load(key)
            codes[key] = record[""] if list(record) == [""] else record
        row = copy.deepcopy(plan.row)
        for holder in holders(row):
            for name in ("audio", "ref_audio"):
                if name in holder:
                    holder[name] = codes[holder[name]]
        with torch.inference_mode():
            return self.model.encode(row)

    # ---- writing

    def _work(self, what, groups, make, length, say):
        """make(group) -> [output or Invalid] for every group of keys, on as many threads as torch may use;
        shards are written on the way. -> {key: Invalid}"""
        if not groups:
            return {}
        failed, shard, cores = {}, Shard(), torch.get_num_threads()
        progress, total = Progress(sum(map(len, groups))), sum(length.values())
        threads = threads_for(groups, length, cores)
        share = max(1, cores // threads)
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(share,))
        try:
            for key, output in paired(groups, pool.map(make, groups)):
                if isinstance(output, Invalid):
                    failed[key] = output
                else:
                    shard.put(key, output, self.shard_of)
                if shard.full:
                    self._write(shard)
                    shard = Shard()
                if progress.due(length.get(key, 0)):
                    say(progress_line(what, progress, total))
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)
            self._write(shard)
        return failed

    def _write(self, shard):
        if not shard.records:
            return
        header = {"records": json.dumps(shard.records)}
        number = max([shard_number(path) for path in self._shards()], default=0) + 1
        path = self.folder / f"{number:05d}-{sha(header['records'])[:SHARD_DIGITS]}.safetensors"
        write_file(path, safetensors.torch.save(shard.tensors, header))
        self._remember(path)
        self.shard_of.update(dict.fromkeys(shard.tensors, path))
        self.records.update(shard.records)


def threads_for(groups, length, cores):
    """As many as cores, or as many as the audio of the largest group leaves memory for."""
    largest = max(len(group) * length.get(group[0], 0) for group in groups)
    return max(1, min(cores, int(MEMORY_SECONDS / max(1, largest))))


def paired(groups, outputs):
    """(key, what was made of it), in the order in which groups come out of the pool."""
    for group, made in zip(groups, outputs):
        yield from zip(group, made)


def progress_line(what, progress, total):
    """total: seconds of audio that the work has, 0 where it has none and the number of rows counts."""
    elapsed, done, count = progress.elapsed, progress.done, progress.count
    if total:
        minutes = f"{progress.seconds / 60:.1f} of {total / 60:.1f} min"
        speed = f" | {minutes} | {progress.seconds / elapsed:.0f} s audio/s"
        left = elapsed * (total - progress.seconds) / max(progress.seconds, 1e-9)
    else:
        speed, left = "", elapsed * (count - done) / done
    return f"encoded {done}/{count} {what}{speed} | {done / elapsed:.1f} {what}/s | {clock(left)} left"


def name_of(row):
    return shown(row.get("id", row.get("audio")), 300)


def as_record(output):
    return output if isinstance(output, dict) else {"": output}


def attempt(make, *arguments):
    try:
        return make(*arguments)
    except Invalid as e:
        return e
