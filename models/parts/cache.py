"""What the frozen codec made of each clip, on disk: encoded once, found again for ever.

    cache = ClipCache("data/cache", model)
    cache.add(rows)                         # encodes what is missing; a kill loses seconds
    example = cache.get(rows[0])            # {name: CPU tensor}, as windows into the files

Rows are those of models.parts.manifests. The model offers encode, encode_audio, encode_key, codec_key and sample_rate;
and encode_audio_batch, several waves in and as many codec outputs out, where its codec can take more than one at a time.
"""
import copy
import hashlib
import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from models.parts import Invalid, audio
from models.parts.clips import hash_file
from models.parts.manifests import CUT, holders, listing

# What encode may look at. Anything else in a row (id, duration, ...) can change without encoding it again.
READ = ("audio", "text", "speaker", "speaker_id", "ref_audio", "ref_text", "emotion", "turns", "messages", *CUT)
SHARD_BYTES, SHARD_SECONDS, SHARD_RECORDS = 64 << 20, 20, 4096  # what a kill can lose, at most
# Audio in one pass of the codec, padding included. On a CPU several clips at once take longer than one after the other,
# since their layers do not fit into its caches; there, each thread takes a clip of its own.
BATCH_SECONDS = {"cpu": 0, "cuda": 120}


def write_file(path, data):
    """Bytes that appear whole or not at all, and are on the disk when this returns."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as f:
            f.write(data)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as e:
        raise Invalid(f"{path} cannot be written: {e.strerror}. Free space or choose another folder; what was written "
                      "before is whole.") from None


def stamp(path):
    """Size and time of change: while both stay, a file is taken to be the same."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns]


def read_memo(path):
    try:
        known = json.loads(Path(path).read_bytes())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):  # a memo only saves time
        return {}


def clock(s):
    return f"{int(s) // 3600}:{int(s) // 60 % 60:02d}:{int(s) % 60:02d}"


def sha(*parts):
    h = hashlib.sha256()
    for part in parts:
        h.update(part if isinstance(part, memoryview) else str(part).encode("utf-8", "surrogatepass"))
    return h.hexdigest()[:32]


def hash_of(flat):
    return sha(flat.dtype, memoryview(flat.contiguous().view(torch.uint8).numpy())) if flat.numel() else sha(flat.dtype)


class ClipCache:
    """What `encode` made of each row, in safetensors shards in one folder, for any number of checkpoints and manifests.

    A tensor is stored flat under the hash of its bytes, so that equal tensors are stored once and damage shows. The
    header of a shard holds the records: key -> {name: [tensor, shape]}. There are two kinds of key. The codec's output
    hangs on the bytes of the sound file, the cut, the gain and model.codec_key; an example on every other key that
    encode reads, and on model.encode_key: a corrected transcript does not run the codec again.
    """

    def __init__(self, folder, model):
        self.folder, self.model = Path(folder), model
        self.records, self.where, self.handles, self.sound, self.bad, self.failed = {}, {}, {}, set(), [], {}
        self.memo = read_memo(self.folder / "files.json")  # path -> [size, time, hash]: saves reading them again
        whole = read_memo(self.folder / "shards.json")  # shard -> [size, time] at which all of its hashes were right
        for shard in sorted(self.folder.glob("*.safetensors")):
            try:
                self._open(shard, whole.get(shard.name))
            except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError):
                self.bad.append(shard)
        self.records = {k: r for k, r in self.records.items() if r and all(t in self.where for t, _ in r.values())}

    def _open(self, shard, whole):
        found = stamp(shard)
        with open(shard, "rb") as f:
            header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
        records = header.pop("__metadata__")["records"]
        if sha(records)[:12] != shard.stem.rpartition("-")[2]:
            raise ValueError("damaged")
        records = json.loads(records)
        if whole != found:  # copied, restored or touched since it was written
            if any(hash_of(t) != name for name, t in safetensors.torch.load_file(shard).items()):
                raise ValueError("damaged")
            self._remember(shard)
        self.where.update(dict.fromkeys(header, shard))
        self.records.update(records)

    def _remember(self, shard):
        self._note("shards.json", read_memo(self.folder / "shards.json") | {shard.name: stamp(shard)})

    def _note(self, name, memo):
        try:
            write_file(self.folder / name, json.dumps(memo).encode("utf-8", "surrogatepass"))
        except Invalid:  # a cache that may only be read is still a cache
            pass

    def _hash(self, path):
        try:
            now = stamp(path)
            if self.memo.get(path, ())[:2] != now:
                self.memo[path] = [*now, hash_file(path)]
        except OSError as e:
            raise Invalid(f"{path} cannot be read: {e.strerror}") from None
        return self.memo[path][2]

    def _plan(self, row):
        """-> (key of the example, {key of codec output: (path, start, end, gain)}, the row with those keys as its audio)"""
        told, wanted = copy.deepcopy({k: row[k] for k in READ if k in row}), {}
        for t in (told, *told.get("turns", ())):
            if "speaker_id" in t:  # the number that stands for the name
                t["speaker"] = t.pop("speaker_id")
        own = [told.get(k) for k in ("audio", *CUT)]
        for holder in holders(told):
            cut = [holder.pop(k, None) for k in CUT]
            cut = own[1:] if holder.get("type") == "audio" and holder["audio"] == own[0] else cut
            for name, cut in (("audio", cut), ("ref_audio", [None] * 3)):
                if name in holder:
                    path = holder[name]
                    holder[name] = sha("codec", self._hash(path), json.dumps(cut), self.model.codec_key)
                    wanted[holder[name]] = (path, *cut)
        heard = {"emotion": self._hash(told["emotion"])} if isinstance(told.get("emotion"), str) else {}
        return sha("example", self.model.encode_key, json.dumps({**told, **heard}, sort_keys=True)), wanted, told

    def missing(self, rows) -> list[int]:
        """Which rows have no example yet. Reads sound files only where their size or time is new."""
        before = len(self.memo)
        out = [i for i, row in enumerate(rows) if self._plan(row)[0] not in self.records]
        if len(self.memo) != before:
            self._note("files.json", self.memo)
        return out

    def get(self, row) -> dict[str, torch.Tensor]:
        """The example of a row, as windows into the shard."""
        return self.load(self.key(row))

    def key(self, row) -> str:
        """What `load` finds the example of a row by; from then on the row's files are not looked at any more."""
        key = self._plan(row)[0]
        if key not in self.records:
            name = row.get("id", row.get("audio"))
            raise Invalid(f"{name} is not in {self.folder}; run prepare_data.py for this checkpoint")
        return key

    def load(self, key):
        out = {}
        for name, (tensor, shape) in self.records[key].items():
            shard = self.where[tensor]
            try:
                if shard not in self.handles:
                    self.handles[shard] = safetensors.safe_open(shard, "pt")
                flat = self.handles[shard].get_tensor(tensor)
            except (OSError, safetensors.SafetensorError) as e:
                raise Invalid(f"{shard} cannot be read ({e}); run prepare_data.py again") from None
            if tensor not in self.sound:  # looked at once per process
                if hash_of(flat) != tensor:
                    (self.folder / "shards.json").unlink(missing_ok=True)  # so that the next start looks at every byte
                    raise Invalid(f"{shard} is damaged; run the same command again, and its rows will be encoded again")
                self.sound.add(tensor)
            out[name] = flat.view(shape)
        return out

    def add(self, rows, say=print) -> None:
        """Encode the rows that are missing, and only the audio that is new, with a line of progress every few seconds."""
        for stale in self.folder.glob(".*.tmp"):
            if time.time() - stale.stat().st_mtime > 600:  # of a process that was killed; no write takes that long
                stale.unlink(missing_ok=True)
        if self.bad:
            names = ", ".join(b.name for b in self.bad[:3])
            say(f"{len(self.bad)} damaged shards in {self.folder} ({names}): encoding their rows again")
        plans = {}
        for row in rows:
            key, wanted, told = self._plan(row)
            if key not in self.records:
                plans.setdefault(key, (row, wanted, told))
        self._note("files.json", self.memo)
        sounds = {k: source for _, wanted, _ in plans.values() for k, source in wanted.items() if k not in self.records}
        length = {k: (audio.info(path).seconds if end is None else end) - (start or 0)
                  for k, (path, start, end, _) in sounds.items()}
        order = sorted(sounds, key=length.get, reverse=True)  # the longest first: too little memory shows at once
        failed = self._work("clips", self._groups(order, length), lambda g: self._codecs([sounds[k] for k in g]), length, say)
        ready = [k for k, (_, wanted, _) in plans.items() if all(s in self.records for s in wanted)]
        failed |= self._work("rows", [[k] for k in ready], lambda g: [attempt(self._example, *plans[g[0]][1:])], {}, say)
        for shard in self.bad:
            shard.unlink(missing_ok=True)
        self.bad = []
        self.failed = {str(row.get("id", row.get("audio"))): str(failed[k]) for key, (row, wanted, _) in plans.items()
                       for k in (*wanted, key) if k in failed}
        if self.failed:
            names = {}
            for name, why in self.failed.items():
                names.setdefault(why, []).append(name)
            raise Invalid(listing([(n[0] + (f" and {len(n) - 1} more rows" if n[1:] else ""), 0, why) for why, n in names.items()]))

    def _groups(self, order, length):
        """Clips that share a pass of the codec: neighbours in length, bounded by the seconds of the padded whole."""
        device = next((p.device.type for p in self.model.codec.parameters()), "cpu")
        most = BATCH_SECONDS.get(device, 0) if hasattr(self.model, "encode_audio_batch") else 0
        groups = []
        for k in order:
            if groups and length[groups[-1][0]] * (len(groups[-1]) + 1) <= most:
                groups[-1].append(k)
            else:
                groups.append([k])
        return groups

    def _codecs(self, sources):
        """What the codec makes of each (path, start, end, gain), or the Invalid that says what is wrong with that one."""
        if len(sources) > 1:
            try:
                with torch.inference_mode():
                    return [named(out) for out in self.model.encode_audio_batch([self._wave(*s) for s in sources])]
            except Invalid:  # one of them; alone, each answers for itself
                pass
        return [attempt(self._codec, *s) for s in sources]

    def _wave(self, path, start, end, gain):
        wave = audio.read(path, self.model.sample_rate, start, end)[0]
        wave = wave if gain is None else wave * 10 ** (min(gain, 1e3) / 20)
        if not wave.isfinite().all():
            raise Invalid(f"{path}: gain_db {gain} makes it louder than a number can be")
        return wave

    def _codec(self, path, start, end, gain):
        with torch.inference_mode():
            plain = (path, start, end) if gain is None else (self._wave(path, start, end, gain),)
            return named(self.model.encode_audio(*plain))

    def _example(self, wanted, told):
        codes = {k: c[""] if list(c) == [""] else c for k, c in ((k, self.load(k)) for k in wanted)}
        told = copy.deepcopy(told)
        for holder in holders(told):
            holder.update({name: codes[holder[name]] for name in ("audio", "ref_audio") if name in holder})
        with torch.inference_mode():
            return self.model.encode(told)

    def _work(self, what, groups, make, length, say):
        """make(group) -> [output or Invalid] for every group of keys, on as many threads as torch may use; shards are
        written on the way. -> {key: Invalid}"""
        if not groups:
            return {}
        count = sum(map(len, groups))
        cores, total, done, failed = torch.get_num_threads(), sum(length.values()), 0.0, {}
        largest = max(1, *(len(g) * length.get(g[0], 0) for g in groups))
        threads = max(1, min(cores, int(240 / largest)))  # so many seconds of audio fit into memory
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(max(1, cores // threads),))
        batch, tensors, size, begun, spoken, written = {}, {}, 0, time.time(), time.time(), time.time()
        try:
            found = (pair for group, outs in zip(groups, pool.map(make, groups)) for pair in zip(group, outs))
            for n, (key, out) in enumerate(found, 1):
                done += length.get(key, 0)
                if isinstance(out, Invalid):
                    failed[key] = out
                else:
                    record = {}
                    for name, t in out.items():
                        flat = t.detach().to("cpu").reshape(-1)
                        record[name] = [hash_of(flat), list(t.shape)]
                        if record[name][0] not in self.where and record[name][0] not in tensors:
                            tensors[record[name][0]] = flat.clone()
                            size += flat.nbytes
                    batch[key] = record  # whole, since a signal may send what is here to the disk at any line
                now = time.time()
                if now - written > SHARD_SECONDS or len(batch) >= SHARD_RECORDS or size > SHARD_BYTES:
                    self._write(batch, tensors)
                    batch, tensors, size, written = {}, {}, 0, now
                if now - spoken > 5 or n == count:
                    spoken, past = now, max(now - begun, 1e-9)
                    rate = f" | {done / 60:.1f} of {total / 60:.1f} min | {done / past:.0f} s audio/s" if total else ""
                    left = past * ((total - done) / max(done, 1e-9) if total else (count - n) / n)
                    say(f"encoded {n}/{count} {what}{rate} | {n / past:.1f} {what}/s | {clock(left)} left")
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(cores)
            self._write(batch, tensors)
        return failed

    def _write(self, records, tensors):
        if not records:
            return
        header = {"records": json.dumps(records)}
        number = len(list(self.folder.glob("*.safetensors"))) + 1
        shard = self.folder / f"{number:05d}-{sha(header['records'])[:12]}.safetensors"
        write_file(shard, safetensors.torch.save(tensors, header))
        self._remember(shard)
        self.where.update(dict.fromkeys(tensors, shard))
        self.records.update(records)


def named(out):
    return out if isinstance(out, dict) else {"": out}


def attempt(make, *arguments):
    try:
        return make(*arguments)
    except Invalid as e:
        return e
