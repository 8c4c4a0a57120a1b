"""Make the demo's speech: sentences of a small language, spoken by robots made of the synthesiser flite.

    apt-get install flite                # Debian, Ubuntu; version 2.2 here
    python demo/make_speech.py           # what base.yaml trains on, and the test sentences
    python demo/make_speech.py --part voice --output_dir demo/voice      # the target voice, and 10 held out
    python demo/make_speech.py --part tokenizer --output_dir demo/base   # tokenizer.json, one piece per word

Everything is a function of the seed and of flite's version. No sentence is in two of base, val, voice, held
out and test. The base hears six robots by name (ROBOTS) and, without a name, a crowd of blends of the same
three synthesiser voices; it never hears slt, which is the target.

Every robot has one rendering of each word and says it like that in every sentence. That is what lets a
model of four million parameters learn to speak within an hour of one core; prosody is what it costs.
"""
import functools
import json
import os
import random
import re
import shutil
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs
from demo import robot
from demo.robot import RATE, Frames
from models.parts import Invalid, opt


class Robot(NamedTuple):
    voice: str | tuple  # of flite, or the share of each of VOICES in a blend
    pitch: int  # Hz, a multiple of 25
    tract: float = 1.0  # above one: a shorter vocal tract than the synthesiser's


# Pitch and vocal tract are crossed, so that neither tells the other nor the words. All pitches are multiples
# of 50 Hz: the codec's dimensions stay few.
ROBOTS = {
    "Alpha": Robot("kal16", 100),
    "Bravo": Robot("kal16", 200, 1.16),
    "Charlie": Robot("awb", 150),
    "Delta": Robot("awb", 200, 1.08),
    "Echo": Robot("rms", 100, 1.08),
    "Foxtrot": Robot("rms", 200, 1.16),
}
FIRST = "Alpha"
# Without a name in front anybody speaks, one of a crowd of robots: so words are learned apart from voices.
CROWD = 300
VOICES = ("kal16", "awb", "rms")
PITCHES = (100, 150, 200)  # Hz
TRACTS = 0.92, 1.4
# Shares of a blend may lie outside of 0 to 1: some voices are between the three, some further out.
BEYOND = 1.4
FAINT = 1e-3  # levels below are nothing; a blend takes logarithms
TARGET = Robot("slt", 200)
PACE = "kal16"  # all robots speak as fast as this voice does
SPEED = 1.15  # words spoken alone are slower than in a sentence
PAUSE = Frames(np.zeros((8, robot.BANDS)), np.zeros(8))  # a block of silence: at both ends, and at a comma

# ------------------------------------------------------------------------------------------------ sentences

# No two of these words sound alike, or a recogniser without grammar could not be used to measure the result.
WORDS = dict(
    person="teacher doctor farmer sister captain soldier",
    name="Peter Susan Robert Laura Oliver Victor",
    animal="rabbit monkey elephant dolphin parrot tiger",
    thing="table window basket hammer guitar umbrella newspaper bicycle pillow candle",
    things="boxes flags bananas flowers presents",
    food="potatoes chocolate pepper honey cookies",
    place="kitchen village mountain river hospital library island",
    color="yellow purple silver orange",
    quality="heavy broken wooden dirty expensive beautiful simple",
    mood="hungry angry nervous careful sleepy happy",
    took="carried painted noticed dropped repaired forgot",
    take="carry paint find drop repair",
    went="waited laughed whispered vanished traveled",
    adverb="slowly suddenly always",
    when="yesterday|this morning|last summer|after dinner|on Monday|in October|at midnight",
    where="under|behind|near|above",
    number="three seven twelve fifty many",
    weather="rainy windy foggy",
    who="my your the",
)
TEMPLATES = """{name} {took} {who} {thing}.
{who} {person} {went}.
{who} {mood} {animal} {went} {where} {who} {place}.
{name} {took} {number} {things} {when}.
{who} {quality} {color} {thing} {went}.
Can we {take} {who} {quality} {thing}?
Where is {who} {color} {thing}?
{name} likes {food}.
Please {take} {who} {color} {thing}.
It was {weather} {when}.
{who} {person} {took} {who} {quality} {thing}.
{when}, {who} {person} {adverb} {went}.
{who} {animal} {took} {food} {where} {who} {place}.
{name} {adverb} {took} {who} {quality} {things} {when}.
Why was {who} {person} so {mood}?
{who} {mood} {person} {took} {number} {things} {where} {who} {place}.
They {adverb} {take} {who} {thing} {when}.
{name} {went} {where} {who} {color} {thing}.""".splitlines()
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LONGEST_LIST = 8  # words without grammar; sentences have up to ten
SHORT_LIST = 3


def words_of(kind):
    return WORDS[kind].split("|" if "|" in WORDS[kind] else None)


def plain(text):
    """Lower case without punctuation: what two spellings of the same speech have in common."""
    return " ".join(re.findall(r"[a-z']+", text.lower()))


@functools.cache
def vocabulary():
    """Every word that a sentence may hold, in lower case; the robots' names are not said, so they are not
    among them.
    """
    fixed = " ".join(re.sub(r"{\w+}", " ", template) for template in TEMPLATES)
    filled = " ".join(WORDS.values()).replace("|", " ")
    return sorted(set(plain(fixed + " " + filled).split()))


def sentence(rng):
    """One sentence, in which no word comes twice: a model that reads badly would not know which of the two
    it is at.
    """
    while True:
        template = rng.choice(TEMPLATES)
        text = re.sub(r"{(\w+)}", lambda slot: rng.choice(words_of(slot[1])), template)
        words = plain(text).split()
        if len(set(words)) == len(words):
            return text[0].upper() + text[1:]


def sentences(counts, seed=0):
    """{part: number} -> {part: [sentences, none twice]}; a larger number for the last part changes no
    other.
    """
    rng, known, out = random.Random(seed), set(), {}
    for part, count in counts.items():
        out[part] = []
        while len(out[part]) < count:
            text = sentence(rng)
            if text not in known:
                known.add(text)
                out[part].append(text)
    return out


def word_list(rng, most):
    """Some words without grammar: where they are few, a model soon learns which sound belongs to which."""
    return " ".join(rng.sample(vocabulary(), rng.randint(1, most)))


# ------------------------------------------------------------------------------------------------ speech


@functools.cache
def spoken_words(voice):
    """{word: Spoken} of the whole vocabulary by one of flite's voices."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = pool.map(lambda word: robot.flite(word + ".", voice), vocabulary())
    return dict(zip(vocabulary(), said))


@functools.cache
def analysed_words(voice):
    """[Frames] of the vocabulary by one of flite's voices. A word lasts a whole number of blocks, and each
    of its phones stands at the same place in all voices: what tells them apart is how they sound, not when.
    """
    paces, clips = spoken_words(PACE), []
    for word, said in spoken_words(voice).items():
        pace = paces[word]
        if len(pace.bounds) != len(said.bounds):
            raise Invalid(f"flite says {word!r} in other phones as {voice} than as {PACE}, so they cannot be "
                          "aligned; is it version 2.2?")
        blocks = max(1, round(pace.seconds / SPEED * RATE / robot.BLOCK))
        steps = blocks * robot.BLOCK // robot.HOP
        times = pace.bounds[0] + (np.arange(steps) + 0.5) * pace.seconds / steps
        clips.append(robot.analyse(said.wave, np.interp(times, pace.bounds, said.bounds)))
    return clips


def blend(parts, shares):
    """Frames of several voices that say the same: levels on a scale of logarithms, voicing in proportion."""
    logs = sum(share * np.log(part.levels + FAINT) for part, share in zip(parts, shares))
    voicing = sum(share * part.voicing for part, share in zip(parts, shares))
    return Frames(np.exp(logs), voicing.clip(0, 1))


@functools.cache
def word_bank(who):
    """{word: Frames} of a robot."""
    if isinstance(who.voice, str):
        clips = analysed_words(who.voice)
    else:
        clips = [blend(parts, who.voice) for parts in zip(*map(analysed_words, VOICES))]
    clips = [Frames(robot.shorten(clip.levels, who.tract), clip.voicing) for clip in clips]
    return dict(zip(vocabulary(), robot.compress(clips)))


def speak(text, who):
    """(n,) int16 at 16 kHz: the words of a text, and silence at both ends and at commas."""
    bank, parts = word_bank(who), [PAUSE]
    for word in re.findall(r"[a-z']+|,", text.lower()):
        if word != "," and word not in bank:
            raise Invalid(f"{word!r} is not a word of the demo; there are {', '.join(vocabulary())}")
        parts.append(PAUSE if word == "," else bank[word])
    parts.append(PAUSE)
    frames = Frames(*(np.concatenate(column) for column in zip(*parts)))
    wave = robot.synthesise(frames, who.pitch)
    return np.round(wave.clip(-1, 1) * 32767).astype(np.int16)


# ------------------------------------------------------------------------------------- what is to be spoken


VOICE_CLIPS = 60
DEV_CLIPS = 60
POOL = 400  # sentences from which those of the target voice are chosen
CROWD_SHARE = 0.65  # of base's clips: one of the crowd, without a name in front
FIRST_SHARE = 0.15  # the first robot; the rest is shared by all six
FIRST_CLIPS = 1200  # short lists by the first robot alone, from which the base learns to read before all else


class Clip(NamedTuple):
    name: str  # of the file, without suffix
    part: str  # the manifest that lists it
    words: str  # what is said
    who: Robot
    called: str = ""  # the name that stands in front of the words in the manifest

    @property
    def text(self):
        return f"{self.called} {self.words}".strip()


def clips_of(cfg):
    """Every clip of a part. Sentences are drawn in one order for all parts, so that no two share one."""
    counts = {"test": 30, "heldout": 10, "val": 24, "pool": POOL, "base": cfg.clips}
    said, first = sentences(counts, cfg.seed), ROBOTS[FIRST]
    if cfg.part == "voice":
        chosen = covering(said["pool"], VOICE_CLIPS)
        clips = [Clip(f"{i:02d}", "voice", text, TARGET) for i, text in enumerate(chosen)]
        clips += [Clip(f"heldout_{i:02d}", "heldout", text, TARGET) for i, text in enumerate(said["heldout"])]
        return clips
    clips = [Clip(f"test{i:02d}", "test", text, first) for i, text in enumerate(said["test"])]
    clips += [Clip(f"target{i:02d}", "test_target", text, TARGET) for i, text in enumerate(said["test"])]
    # More unseen sentences, to choose settings by, so that those of the test stay out of it.
    spoken = covering(said["pool"], VOICE_CLIPS)
    unseen = [text for text in said["pool"] if text not in spoken][:DEV_CLIPS]
    for i, text in enumerate(unseen):
        clips.append(Clip(f"dev{i:02d}", "dev", text, first))
        clips.append(Clip(f"dev_target{i:02d}", "dev_target", text, TARGET))
    rng = random.Random(cfg.seed + 1)
    crowd = [anybody(rng) for _ in range(CROWD)]
    clips += [Clip(f"val{i:02d}", "val", text, *pick_robot(rng, crowd)) for i, text in enumerate(said["val"])]
    for i in range(FIRST_CLIPS):
        clips.append(Clip(f"first{i:05d}", "first", word_list(rng, SHORT_LIST), first, FIRST))
    for i, text in enumerate(said["base"]):
        words = text if i % 2 else word_list(rng, rng.choice((SHORT_LIST, LONGEST_LIST)))
        clips.append(Clip(f"base{i:05d}", "base", words, *pick_robot(rng, crowd)))
    return clips


def pick_robot(rng, crowd):
    """A robot and what it is called: nothing, where it is one of the crowd."""
    draw = rng.random()
    if draw < CROWD_SHARE:
        return rng.choice(crowd), ""
    called = FIRST if draw < CROWD_SHARE + FIRST_SHARE else rng.choice(list(ROBOTS))
    return ROBOTS[called], called


def anybody(rng):
    """A robot drawn anew."""
    parts = [rng.expovariate(1) for _ in VOICES]  # in proportion to their sum all blends are as likely
    middle = 1 / len(VOICES)
    shares = tuple(middle + BEYOND * (part / sum(parts) - middle) for part in parts)
    return Robot(shares, rng.choice(PITCHES), rng.uniform(*TRACTS))


def covering(texts, count):
    """`count` of the texts, each chosen for the words that the ones before it hold least often, as scripts
    are for recordings.
    """
    times, chosen, left = Counter(), [], list(texts)
    for _ in range(count):
        best = max(left, key=lambda text: sum(0.3 ** times[word] for word in plain(text).split()))
        left.remove(best)
        chosen.append(best)
        times.update(plain(best).split())
    return chosen


# ------------------------------------------------------------------------------------------------ tokenizer


def tokenizer():
    """A tokenizer.json that knows whole words alone: what is none of them becomes <unk>, which infer.py and
    prepare_data.py report.

    Capital letters become small and full stops vanish, so a word is the same piece wherever it stands. Ids
    101 to 104 stay free of text: the model uses those rows of its embedding as audio marks.
    """
    mark, special = "\u2581", ["<|audio_start|>", "<|audio_end|>", "<|ref_audio_start|>", "<|ref_audio_end|>"]
    names = [name.lower() for name in ROBOTS]
    pieces = ["<unk>", "<s>", "</s>"] + [mark + word for word in [",", *names, *vocabulary()]]
    pieces[101:101] = special
    vocab = {piece: i for i, piece in enumerate(pieces)}
    added = [{"id": vocab[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": True} for name in ("<unk>", "<s>", "</s>", *special)]
    changes = {4 * " ": " ", 3 * " ": " ", 2 * " ": " "}
    changes |= {" " + stop: stop for stop in ",.?!"} | {stop: "" for stop in ".?!"} | {",": " ,"}
    changes |= {letter.upper(): letter for letter in LETTERS}
    steps = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in changes.items()]
    decoders = [{"type": "Replace", "pattern": {"String": mark}, "content": " "}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    # Byte-pair encoding without a merge, and words that are taken whole before any would be looked for.
    model = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": False, "ignore_merges": True,
             "vocab": vocab, "merges": []}
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": steps},
            "pre_tokenizer": {"type": "Metaspace", "replacement": mark, "prepend_scheme": "always",
                              "split": True},
            "post_processor": None, "decoder": {"type": "Sequence", "decoders": decoders}, "model": model}


# --------------------------------------------------------------------------------------------- command line


@dataclass
class MakeSpeech:
    """Speak the demo's sentences."""
    output_dir: str = opt("runs/demo/speech", "folder for the clips (FLAC, 16 kHz) and their manifests")
    part: str = opt("base", "base (with first, val and test), voice, or tokenizer", choices=("base", "voice", "tokenizer"))
    clips: int = opt(8000, "clips of base, half of them sentences and half lists of words")
    seed: int = opt(0, "of sentences and voices")


def write_clip(folder, clip):
    """Speak one clip. Returns its row of the manifest."""
    wave = speak(clip.words, clip.who)
    soundfile.write(folder / "clips" / f"{clip.name}.flac", wave, RATE, subtype="PCM_16")
    seconds = round(len(wave) / RATE, 3)
    return {"audio": f"clips/{clip.name}.flac", "text": clip.text, "id": clip.name, "duration": seconds}


def main():
    cfg = configs.parse(MakeSpeech)
    folder = Path(cfg.output_dir)
    if cfg.part == "tokenizer":
        folder.mkdir(parents=True, exist_ok=True)
        spec = tokenizer()
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        pieces = len(spec["model"]["vocab"])
        print(f"{pieces} pieces in {path}; config.json must say so in lm_config.vocab_size")
        return
    if not shutil.which("flite"):
        raise Invalid("the program flite was not found; on Debian and Ubuntu: apt-get install flite")
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    lists = {}
    for clip in clips_of(cfg):
        lists.setdefault(clip.part, []).append(write_clip(folder, clip))
    if cfg.part == "voice":
        # The control: the same clips, each with the text of another.
        rows = lists["voice"]
        others = rows[7:] + rows[:7]
        lists["shuffled"] = [dict(row, text=other["text"]) for row, other in zip(rows, others)]
        # The sentences alone, for infer.py --input.
        texts = "".join(row["text"] + "\n" for row in lists["heldout"])
        (folder / "heldout.txt").write_text(texts, encoding="utf-8")
    for part, rows in lists.items():
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{part}.jsonl").write_text(lines, encoding="utf-8")
        hours = sum(row["duration"] for row in rows) / 3600
        print(f"{part}: {len(rows)} clips, {hours:.2f} h, in {folder / part}.jsonl")


if __name__ == "__main__":
    configs.run(main)
