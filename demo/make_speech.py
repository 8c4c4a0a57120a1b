"""Make the demo's speech: sentences from a small grammar, spoken by the synthesiser flite.

    python demo/make_speech.py --output_dir runs/demo/speech                # base.jsonl, val.jsonl and their clips
    python demo/make_speech.py --part codec --output_dir runs/demo/codec    # some of the same sentences, in more voices
    python demo/make_speech.py --part test --output_dir runs/demo/test      # 30 unseen sentences in each of the four voices
    python demo/make_speech.py --part voice --output_dir demo/voice         # clips of the target voice, and 10 held out
    python demo/make_speech.py --part tokenizer --output_dir demo/recipe     # tokenizer.json for sentences like these

Everything is a function of the seed and of flite's version (2.2 here). No sentence is in two of base, val, voice, held
out and test. Neither base nor codec ever hear the voice slt: fine-tuning is what teaches it. The voices that they do hear,
kal16, awb and rms, are all male. Some of their clips are therefore spoken with another pitch and a shorter vocal tract,
and the codec's part has some voices of espeak-ng, if that is installed.
"""
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs
from models.parts import Invalid, opt

RATE = 16000
VOICES, TARGET = ("kal16", "awb", "rms"), "slt"
ESPEAK = ("en-us+f2", "en-us+f3", "en-us+f5", "en+f4", "en-us+m3", "en+m7")

# ------------------------------------------------------------------------------------------------ sentences

# No two of these words sound alike, or a recogniser without grammar could not be used to measure the result.
WORDS = dict(
    person="teacher doctor farmer sister brother mother father neighbor driver painter singer sailor baker captain student "
           "uncle cousin lady soldier nurse lawyer artist dentist waiter grandmother president",
    name="Peter Susan Robert Helen Martin Laura Oliver Emma Thomas Julia Victor Daniel",
    animal="dog cat horse rabbit chicken monkey tiger lion elephant turtle spider dolphin eagle parrot donkey wolf",
    thing="table window basket letter bottle picture hammer ladder pencil blanket candle mirror pillow bucket carpet jacket "
          "button ticket kettle lamp guitar piano camera engine bicycle umbrella newspaper magazine machine package wallet",
    things="boxes books shoes flags coins stones chairs flowers bananas glasses papers presents feathers balloons toys",
    food="apples oranges potatoes cheese butter chocolate soup pepper honey chicken noodles cookies pudding mushrooms",
    place="kitchen garden village mountain river forest station market school library hospital harbor bridge island valley "
          "castle church museum office airport bakery theater desert bathroom",
    color="yellow purple black green silver golden orange",
    quality="heavy broken little ancient wooden gentle clever dirty empty narrow enormous expensive beautiful strange famous "
            "plastic modern useful simple perfect",
    mood="hungry lazy happy angry quiet nervous tired lonely careful polite sleepy proud friendly",
    took="carried painted found watched opened bought cleaned borrowed followed noticed dropped lifted ordered repaired "
         "finished forgot promised described",
    take="carry paint find watch open clean borrow follow notice drop lift order repair finish",
    went="slept waited laughed danced worked whispered vanished shouted traveled listened stopped arrived",
    adverb="slowly quickly quietly carefully suddenly often always never finally",
    when="yesterday|this morning|last summer|every evening|after dinner|before breakfast|on Monday|on Friday|at midnight|"
         "in October|in winter|last week|tomorrow|on Sunday|in December",
    where="under|behind|beside|near|above|inside",
    number="three five six seven nine eleven twelve twenty thirty fifty many several",
    weather="rainy windy sunny cloudy foggy stormy",
    day="afternoon morning evening holiday weekend",
    who="my your their his the",
)
TEMPLATES = """The {quality} {thing} is {where} the {thing}.
{name} {took} the {color} {thing} {when}.
{who} {person} {took} {number} {things} in the {place}.
{who} {mood} {person} {went} {where} the {place}.
Where is the {quality} {color} {thing}?
Why was {name} so {mood} {when}?
Did {who} {person} {take} the {quality} {thing}?
Can you {take} the {thing} {where} the {place}?
Have you seen {who} {color} {thing}?
Please {take} the {thing} and the {thing}.
The {mood} {animal} {adverb} {went} {where} the {thing}.
The {animal} and the {animal} {went} in the {place}.
We saw {number} {things} and a {quality} {thing} {when}.
{name} and {name} like {food} with {food}.
It was a {weather} {day} in the {place}.
{who} {person} {adverb} {took} the {animal} {when}.
She will {take} the {thing} {when}.
They were {mood} and {mood} {when}.
I think {name} should {take} the {color} {thing}.
You can find {number} {color} {things} {where} the {place}.
He gave the {quality} {thing} to {who} {person}.
The {person} from the {place} was {mood}, but {name} was {mood}.
If it is {weather}, we {adverb} {take} the {thing}.
{when}, the {person} {took} a {quality} {thing}.
Nobody {took} the {animal} {where} the {place}.
Do not {take} {who} {quality} {thing}, {name}.
{name} has {number} {things} and {number} {things}.
What a {quality} {place}!
Was the {animal} {mood}?
Bring {food} and {food} to the {place}.""".splitlines()


def words_of(kind):
    return [w for w in WORDS[kind].split("|" if "|" in WORDS[kind] else None)]


def vocabulary():
    """Every word that a sentence may hold, in lower case."""
    text = " ".join(t.format_map({k: "" for k in WORDS}) for t in TEMPLATES) + " " + " ".join(w.replace("|", " ") for w in WORDS.values()) + " an"
    return sorted(set(plain(text).split()))


def plain(text):
    """Lower case without punctuation: what two spellings of the same speech have in common."""
    return " ".join("".join(c if c.isalpha() or c == "'" else " " for c in text.lower()).split())


def sentence(rng):
    text, used = "", set()
    for part in rng.choice(TEMPLATES).replace("}", "{").split("{"):
        if part in WORDS:
            part = rng.choice([w for w in words_of(part) if w not in used])
            used.add(part)
        text += part
    return re.sub(r"\ba (?=[aeio])", "an ", text[0].upper() + text[1:])


def sentences(counts, seed=0):
    """{part: number} -> {part: [distinct sentences, none in two parts]}; a larger number for the last part changes no other."""
    rng, seen, out = random.Random(seed), set(), {}
    for part, count in counts.items():
        out[part] = []
        while len(out[part]) < count:
            text = sentence(rng)
            if text.lower() not in seen:
                seen.add(text.lower())
                out[part].append(text)
    return out


# ------------------------------------------------------------------------------------------------ speech


def speak(text, voice, pitch=0, shift=1.0):
    """(n,) int16 at 16 kHz. pitch (Hz) where a voice obeys it, 0 leaves it; shift > 1 is a shorter vocal tract, same tempo."""
    if voice in ESPEAK:
        command = ["espeak-ng", "-v", voice, "-s", "150", "--stdout", text]
    else:
        command = ["flite", "-voice", voice, *(["--setf", f"int_f0_target_mean={pitch / shift}"] if pitch else []),
                   *(["--setf", f"duration_stretch={shift}"] if shift != 1 else []), "-t", text, "-o", "/dev/stdout"]
    done = subprocess.run(command, capture_output=True)
    data = done.stdout.find(b"data")
    if done.returncode or data < 0:
        raise Invalid(f"{' '.join(command)} failed: {done.stderr.decode(errors='replace').strip() or 'no audio came out'}")
    # Neither program can seek back in a pipe, so the lengths in their header are not to be believed.
    wav = np.frombuffer(done.stdout[data + 8:][:len(done.stdout[data + 8:]) // 2 * 2], "<i2").astype(np.float32) / 32768
    rate = int.from_bytes(done.stdout[24:28], "little") * shift
    if rate != RATE:  # straight from the spectrum: exact for a whole clip, and nothing else has to be installed
        n = round(len(wav) * RATE / rate)
        spectrum = np.fft.rfft(wav)
        kept = np.zeros(n // 2 + 1, spectrum.dtype)
        k = min(len(kept), len(spectrum))
        kept[:k] = spectrum[:k]
        wav = np.fft.irfft(kept, n) * n / len(wav)
    return trim(wav)


def trim(wav, keep=0.05, threshold=0.004):
    """Silence at both ends is cut to `keep` seconds, so that a model need not guess how long to wait before it stops."""
    loud = np.flatnonzero(np.abs(wav) > threshold)
    if not len(loud):
        raise Invalid("the synthesiser returned silence")
    pad = round(keep * RATE)
    wav = wav[max(0, loud[0] - pad):loud[-1] + pad]
    return np.round(np.clip(wav, -1, 1) * 32767).astype(np.int16)


def another_speaker(rng):
    """Pitch and vocal tract length for a variant of a voice."""
    return dict(pitch=rng.choice([0, rng.uniform(90, 240)]), shift=round(rng.uniform(0.95, 1.25), 3))


def jobs(cfg):
    """What to speak: [(file name without suffix, list name, text, arguments of speak)]."""
    said = sentences({"test": 30, "heldout": 10, "voice": 50, "val": 48, "base": cfg.sentences}, cfg.seed)
    rng, out = random.Random(cfg.seed + 1), []
    if cfg.part == "base":
        for part in ("val", "base"):
            for i, text in enumerate(said[part]):
                for voice in rng.sample(VOICES, 1 if part == "val" else cfg.voices_per_sentence):
                    how = another_speaker(rng) if rng.random() < cfg.varied else {}
                    out.append((f"{part}{i:05d}_{voice}", part, text, dict(how, voice=voice)))
    elif cfg.part == "codec":
        espeak = ESPEAK if shutil.which("espeak-ng") else ()
        for i, text in enumerate(said["base"]):
            how = another_speaker(rng) if i % 2 else {}
            how = dict(voice=rng.choice(espeak)) if espeak and i % 8 == 7 else dict(how, voice=rng.choice(VOICES))
            out.append((f"{i:05d}", "codec", text, how))
    elif cfg.part == "voice":
        out += [(f"{i:02d}", "voice", text, dict(voice=TARGET)) for i, text in enumerate(said["voice"])]
        out += [(f"heldout_{i:02d}", "heldout", text, dict(voice=TARGET)) for i, text in enumerate(said["heldout"])]
    else:
        out += [(f"{i:02d}_{voice}", f"test_{voice}", text, dict(voice=voice)) for voice in (*VOICES, TARGET) for i, text in enumerate(said["test"])]
    return out


def make(job):
    """Speak one clip unless it is there. Returns its seconds."""
    folder, name, text, how = job
    path = Path(folder) / f"{name}.flac"
    if not path.exists():
        soundfile.write(path.with_suffix(".part"), speak(text, **how), RATE, format="FLAC", subtype="PCM_16")
        os.replace(path.with_suffix(".part"), path)
    return soundfile.info(path).duration


# ------------------------------------------------------------------------------------------------ tokenizer


def tokenizer(texts, merges):
    """A tokenizer.json for these texts: byte-pair encoding in the manner of Llama, words marked with U+2581.

    Ids 101 to 104 stay free of text: the model uses those rows of its embedding as audio marks.
    """
    mark, letters = "\u2581", "abcdefghijklmnopqrstuvwxyz"
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    for c in [mark, *".,?!'-:;\"()", *"0123456789", *letters, *letters.upper()]:
        vocab[c] = len(vocab)
    for i in range(len(vocab), 101):
        vocab[f"<unused_{i}>"] = i
    special = ["<|audio_start|>", "<|audio_end|>", "<|ref_audio_start|>", "<|ref_audio_end|>"]
    vocab.update({name: 101 + i for i, name in enumerate(special)})
    words = Counter(mark + w for t in texts for w in re.findall(r"[A-Za-z']+", t))  # no merge reaches over a punctuation mark
    words = {tuple(w): n for w, n in words.items()}
    rules = []
    while len(rules) < merges:
        pairs = Counter()
        for word, n in words.items():
            for pair in zip(word, word[1:]):
                pairs[pair] += n
        if not pairs:
            break
        a, b = max(pairs, key=lambda p: (pairs[p], p))
        rules.append([a, b])
        vocab[a + b] = len(vocab)
        merged = {}
        for word, n in words.items():
            i, out = 0, []
            while i < len(word):
                hit = word[i:i + 2] == (a, b)
                out.append(a + b if hit else word[i])
                i += 2 if hit else 1
            merged[tuple(out)] = merged.get(tuple(out), 0) + n
        words = merged
    added = [{"id": vocab[t], "content": t, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
             for t in ("<unk>", "<s>", "</s>", *special)]
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": mark},
                                                               {"type": "Replace", "pattern": {"String": " "}, "content": mark}]},
            "pre_tokenizer": None, "post_processor": None,
            "decoder": {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": mark}, "content": " "},
                                                         {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "model": {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
                      "fuse_unk": True, "byte_fallback": False, "ignore_merges": False, "vocab": vocab, "merges": rules}}


# ------------------------------------------------------------------------------------------------ command line


@dataclass
class MakeSpeech:
    """Speak the demo's sentences with flite."""
    output_dir: str = opt("runs/demo/speech", "folder for the clips (FLAC, 16 kHz) and their manifests")
    part: str = opt("base", "base and val, codec, test, voice, or tokenizer", choices=("base", "codec", "test", "voice", "tokenizer"))
    sentences: int = opt(12000, "distinct sentences of base; codec and tokenizer take as many of the same")
    voices_per_sentence: int = opt(2, "voices that speak each sentence of base, drawn from three")
    varied: float = opt(0.35, "share of base that is spoken with another pitch and vocal tract")
    merges: int = opt(200, "merges of the tokenizer; 0 leaves single characters")
    seed: int = opt(0, "of sentences and voices")
    workers: int = opt(0, "processes; 0 takes one per core")


def main():
    cfg = configs.parse(MakeSpeech)
    folder = Path(cfg.output_dir)
    if cfg.part == "tokenizer":
        spec = tokenizer(sentences({"base": cfg.sentences}, cfg.seed)["base"], cfg.merges)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(spec, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        print(f"{len(spec['model']['vocab'])} pieces in {folder / 'tokenizer.json'}; config.json must say so in lm_config.vocab_size")
        return
    if not shutil.which("flite"):
        raise Invalid("the program flite was not found; on Debian and Ubuntu: apt-get install flite")
    clips = folder / "clips"
    clips.mkdir(parents=True, exist_ok=True)
    todo, seconds = jobs(cfg), []
    with ProcessPoolExecutor(cfg.workers or os.cpu_count()) as pool:
        for length in pool.map(make, [(str(clips), name, text, how) for name, _, text, how in todo], chunksize=8):
            seconds.append(length)
            if len(seconds) % 2000 == 0:
                print(f"{len(seconds)}/{len(todo)} clips", flush=True)
    lists = {}
    for (name, part, text, how), length in zip(todo, seconds):
        lists.setdefault(part, []).append({"audio": f"clips/{name}.flac", "text": text, "id": name, "duration": round(length, 3), "speaker": how["voice"]})
    if cfg.part == "voice":  # the sentences alone, for infer.py --input
        (folder / "heldout.txt").write_text("".join(row["text"] + "\n" for row in lists["heldout"]), encoding="utf-8")
    if cfg.part == "voice":  # the control: the same clips, each with the text of another
        rows = lists["voice"]
        lists["shuffled"] = [dict(row, text=other["text"]) for row, other in zip(rows, rows[7:] + rows[:7])]
    for part, rows in lists.items():
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(todo)} clips, {sum(seconds) / 3600:.2f} h, in {folder}; lists {', '.join(sorted(lists))}")


if __name__ == "__main__":
    configs.run(main)
