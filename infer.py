"""Text in, wav out: one sentence, a file of sentences, a voice to clone, adapters by path and strength.

    python infer.py --ckpt_dir checkpoints/base --lora runs/voice/latest --text "Hello." --output hello.wav
    python infer.py --lora runs/voice/latest:0.8 --input sentences.txt --output_dir out
    python infer.py --ckpt_dir checkpoints/base --input lines.jsonl   # a line may name its own adapter

With --lora alone the base is the one that the adapter records. Fields of the backbone's Sampling are flags,
too (--temperature, --cfg_value, ...): --help --ckpt_dir DIR lists them. Paths of finished files go to stdout,
everything else to stderr.
"""
import dataclasses
import itertools
import math
import os
import re
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import configs
import lora
import models
from configs import Usage, opt
from models.parts import Invalid, adapters, audio, measures, sentences
from models.parts.plain import (LARGEST_JSON, exactly, need, parse, read_bytes, read_object, say, shown,
                                sweep)
from models.parts.textfiles import check_text, one_line
from models.parts.unknown import Unknown, is_spoken


@dataclass
class Infer:
    """Speak with a checkpoint, with or without adapters."""

    ckpt_dir: str = opt("", "folder of the checkpoint, or org/name in the local hub cache; empty takes the adapter's base")
    lora: list[str] = opt([], "adapter folder, with :strength if not 1; several are added up; a line of JSONL may name its own",
                          repeat=True)
    extra: dict[str, str] = opt({}, "places of parts kept elsewhere, as --extra.codec DIR; those not given are searched for")
    config: str = opt("", "training YAML: its pretrained_path is the checkpoint where ckpt_dir is not given")
    text: str = opt("", "what to say")
    output: str = opt("output.wav", "wav file to write; - streams raw 16-bit samples to stdout as they come")
    input: str = opt("", "file of sentences, one per line, or JSONL with text and any of output, lora, prompt_audio, "
                         "prompt_text, reference_audio, speaker, seed, context")
    output_dir: str = opt("", "folder for the files of --input: output_001.wav and so on, or the names in the JSONL")
    batch_size: int = opt(4, "sentences of --input that are generated together")
    max_chars_per_piece: int = opt(0, "texts that are longer are cut between sentences and spoken in pieces; 0: never")
    pause: float = opt(0.2, "seconds of silence between the pieces of a text")
    trim_end: float = opt(-1.0, "cut silence and noise behind the last speech, down to this many seconds; negative leaves it")
    prompt_audio: str = opt("", "recording to continue in the same voice; needs prompt_text")
    prompt_text: str = opt("", "transcript of prompt_audio")
    context: str = opt("", "JSON list or JSONL of earlier turns, oldest first: {text, audio, speaker}; for backbones that "
                           "hear conversations")
    reference_audio: str = opt("", "recording whose voice is taken, without transcript, for backbones that can")
    speaker: str = opt("", "name of a speaker of the training data, for backbones that are told who speaks")
    max_audio_length_ms: int = opt(0, "length at most, instead of max_len; 0 is off")
    seed: int = opt(42, "of every draw")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "of the weights: auto is bfloat16 on CUDA and float32 elsewhere")
    base_bits: int = opt(16, "of the weights: 16 as they are; 8 or 4 take half or a quarter of the memory", choices=(16, 8, 4))
    compile: bool = opt(False, "torch.compile every layer: faster after a slow start")
    ignore_base: bool = opt(False, "load an adapter although it was trained on another base")
    allow_unused_tensors: bool = opt(False, "load a checkpoint although some of its tensors have no place in the model")


LONGEST_PAUSE = 60  # seconds between two pieces of a text; more is a slip


class Request(NamedTuple):
    """One sentence to speak: `item` has the keys of a JSONL line, from the line or else from the flags."""

    output: str
    item: dict


class Take(NamedTuple):
    """What became of a request: its wave and whether it ended at the "end" or at the "cap", or the error."""

    output: str
    wave: torch.Tensor | None
    finish: str | None
    error: Invalid | None = None


# ------------------------------------------------------------------------------------ checkpoint and adapters


MOST_STRENGTH = 1e6  # beyond it no bit of the base is left


def split_strength(spec):
    """'folder:0.5' -> ('folder', 0.5); a path that exists as it stands has strength 1."""
    path, colon, number = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        strength = float(number)
    except ValueError:  # a colon in a path
        return spec, 1.0
    if not abs(strength) <= MOST_STRENGTH:
        raise Usage(f"--lora {shown(spec)}: the strength is {number}, expected a number such as 0.5")
    return path, strength


def checkpoint_of(cfg, chosen):
    """The checkpoint by --ckpt_dir, else by --config, else by what the first adapter records."""
    if cfg.ckpt_dir:
        return cfg.ckpt_dir
    if cfg.config:
        settings, errors = configs.read(cfg.config)
        if errors:
            raise Usage("\n".join(errors))
        for name in ("pretrained_path", *configs.ALIASES["train"]["pretrained_path"]):
            if settings.get(name):
                return str(settings[name])
        raise Usage(f"{cfg.config} has no pretrained_path; give the checkpoint with --ckpt_dir")
    if not chosen:
        raise Usage("give --ckpt_dir with the checkpoint, or --lora with an adapter that records its base")
    return base_of(chosen[0][0])


def base_of(adapter):
    """Where the base of an adapter is, by its record or by its config file."""
    base = adapters.read_record(adapter).get("base") or stated_base(adapter)
    if not base:
        raise Usage(f"{adapter} does not say which base it belongs to; give it with --ckpt_dir")
    # A relative path counts from where it was trained, which is mostly a folder above the adapter.
    for folder in Path(adapter).resolve().parents:
        if not Path(base).exists() and (folder / base).exists():
            return str(folder / base)
    try:
        models.folder_of(base)
    except Invalid as e:
        raise Invalid(f"{adapter} belongs to the base {base}: {e}. If that lies elsewhere now, give it with "
                      "--ckpt_dir.") from None
    return base


def parts_of(cfg, chosen):
    """{part: place} of what lies elsewhere: as given, else as adapters record it, if it is still there."""
    recorded = {}
    for path, _ in chosen:
        recorded |= need(adapters.read_record(path), "extra", dict[str, str], {})
    return {**models.present(recorded), **cfg.extra}


def stated_base(adapter):
    """The base that the config file of another tool names."""
    _, config, _ = adapters.locate(adapter)
    raw = read_object(config) if config else {}
    return need(raw, "base_model", str, "") or need(raw, "base_model_name_or_path", str, "")


def voice_of(item):
    """The name under which the adapters of a request are kept; "" for the base alone."""
    return "\0".join(item["lora"])  # which no path holds


def voices_of(requests):
    """{name: [(path, strength), ...]} of all adapters that requests ask for."""
    voices = {}
    for request in requests:
        name = voice_of(request.item)
        if name not in voices:
            voices[name] = [split_strength(spec) for spec in request.item["lora"]]
    return voices


def load_model(cfg, path, voices):
    """The model with the adapters of all requests: those of one voice on, those of several side by side."""
    device = models.pick_device(cfg.device)
    dtype = models.pick_dtype(cfg.dtype, device)
    chosen = list(itertools.chain(*voices.values()))
    extra, unused = parts_of(cfg, chosen), cfg.allow_unused_tensors
    model = models.load(path, device, dtype, extra=extra, allow_unused=unused, bits=cfg.base_bits)
    if len(voices) > 1:
        adapted = {name: several for name, several in voices.items() if several}
        for name, (loaded, skipped) in lora.load_lora_slots(model, adapted, cfg.ignore_base).items():
            counts = f"{len(loaded)} tensors, {len(skipped)} skipped; one of {len(adapted)} side by side"
            report_adapters(adapted[name], counts, skipped)
    elif chosen:
        loaded, skipped = lora.load_lora_weights(model, chosen, cfg.ignore_base)
        counts = f"{len(loaded)} tensors in {len(lora.lora_modules(model))} modules, {len(skipped)} skipped"
        counts += "; " + scale_of(model, chosen)
        report_adapters(chosen, counts, skipped)
        model.speakers = {**getattr(model, "speakers", {}), **trained_speakers(chosen)}
    if cfg.compile:
        for block in model.blocks():
            block.compile()
    return model


def scale_of(model, chosen):
    """How strongly the adapters act, in words."""
    if len(chosen) > 1:
        ranks = [len(module.lora_A) for module in lora.lora_modules(model).values()]
        return f"rank {max(ranks)} together"
    s = lora.state(model).settings
    return f"r {s.r}, alpha {s.alpha:g}, scale {s.scale:g}"


def report_adapters(chosen, counts, skipped):
    """An adapter that does nothing sounds like the base, so what was loaded is said in numbers."""
    names = " + ".join(f"{path} x {strength:g}" for path, strength in chosen)
    say(f"adapters: {names}: {counts}")
    if skipped:
        more = " ..." if len(skipped) > 3 else ""
        say(f"skipped, since it does nothing: {', '.join(skipped[:3])}{more}")


def trained_speakers(chosen):
    """{name: number} of the speakers that the adapters record."""
    speakers = {}
    for path, _ in chosen:
        speakers |= need(adapters.read_record(path), "speakers", dict[str, int | None], {})
    return speakers


def check_speakers(requests, voices):
    """A name that no adapter of its request was trained with is an error that lists those it was."""
    for voice, chosen in voices.items():
        trained = trained_speakers(chosen)
        names = trained.keys() | {str(number) for number in trained.values()}
        wanted = {request.item["speaker"] for request in requests if voice_of(request.item) == voice}
        wrong = sorted(wanted - names - {""})
        if trained and wrong:
            raise Invalid(f"speaker {', '.join(map(repr, wrong))} is not one of those trained: "
                          f"{', '.join(sorted(trained))}")


def name_speakers(requests, voices, model):
    """Trained on one speaker: nobody has to say which. Adapters side by side have numbers of their own."""
    if not model.speaker_input:
        return
    known = {voice: {**model.speakers, **trained_speakers(chosen)} for voice, chosen in voices.items()}
    for request in requests:
        item, speakers = request.item, known[voice_of(request.item)]
        if len(speakers) == 1:
            item["speaker"] = item["speaker"] or next(iter(speakers))
        if len(voices) > 1:
            item["speaker"] = number_of(item["speaker"], speakers)
            item["context"] = [dict(turn) for turn in item["context"]]
            for turn in item["context"]:
                turn["speaker"] = number_of(turn.get("speaker"), speakers)


def number_of(name, speakers):
    """The number of a speaker as a text, or what was given where no number is known for it."""
    number = speakers.get(name) if isinstance(name, str) else None
    return name if number is None else str(number)


SMALL_VOCABULARY = 500  # words that an error may list


def check_words(requests, model):
    """A word that the tokenizer has no token for would be babbled, which is an error; a sign is left out, and
    is said.
    """
    unknown = Unknown(model)
    wrong, unsaid = [], set()
    for request in requests:
        pieces = dict.fromkeys(unknown.pieces(request.item["text"]))
        unsaid |= {piece for piece in pieces if not is_spoken(piece)}
        spoken = [repr(piece) for piece in pieces if is_spoken(piece)]
        if spoken:
            text = shown(request.item["text"], LONGEST_TEXT_SHOWN)
            wrong.append(f"{text}: the tokenizer has no token for {', '.join(spoken)}")
    if unsaid:
        say(f"no token for {' '.join(sorted(unsaid))}: left unsaid")
    if wrong:
        vocab = model.tokenizer.vocab
        if len(vocab) < SMALL_VOCABULARY:
            words = sorted(piece.strip("\u2581") for piece in vocab if piece[1:].isalpha())
            wrong.append(f"Its words are: {', '.join(words)}")
        raise Invalid("\n".join(wrong))


RETRIES = 3  # more takes of a runaway, as nobody waits for the first chunk of a file; few would need a fifth


def read_sampling(cfg, path, extra):
    """What generate takes besides the request: the flags that only the backbone's Sampling has."""
    flags = [f.name for f in dataclasses.fields(Infer)]
    module = models.find(path)
    refuse_flags_of_others(module, extra)
    sampling = configs.build(module.Sampling, extra, "--", flags, "sampling")
    sampling = dataclasses.asdict(sampling)
    if "retries" not in extra and cfg.output != "-":
        sampling["retries"] = RETRIES
    return sampling


def sampling_flags(module):
    """{accepted name: Setting} of a backbone's Sampling."""
    return configs.names(module.Sampling, "sampling")


def refuse_flags_of_others(module, extra):
    """A flag of another backbone is no slip of the pen: say whose it is and what there is here."""
    here, wrong = sampling_flags(module), []
    for key in extra:
        if configs.find(key, here):
            continue
        others = models.backbones().items()
        owners = [name for name, other in others if configs.find(key, sampling_flags(other))]
        if owners:
            wrong.append(f"--{key}: a flag of {' and '.join(owners)}")
    if wrong:
        own = ", ".join(f.name for f in dataclasses.fields(module.Sampling))
        raise Usage("\n".join([*wrong, f"{module.__name__.rpartition('.')[2]} has {own}"]))


def show_help(argv):
    """The script's own flags, and those of the backbone where a checkpoint is given."""
    print(configs.describe(Infer, configs.names(Infer, "infer")))
    rest = [word for word in argv if word not in HELP]
    cfg, _ = configs.parse(Infer, rest, script="infer", extra=True)
    if not (cfg.ckpt_dir or cfg.lora or cfg.config):
        print("\nBackbones have flags of their own: --help with --ckpt_dir DIR or --lora DIR lists them.")
        return
    path = checkpoint_of(cfg, [split_strength(spec) for spec in cfg.lora])
    module = models.find(path)
    lines = configs.describe_flags(module.Sampling, sampling_flags(module))
    print(f"\nFlags of this backbone ({module.__name__.rpartition('.')[2]}):\n", *lines, sep="\n")
    print(f"\nretries is {RETRIES} where files are written, if it is not given.")


HELP = {"--help", "-h"}


# ------------------------------------------------------------------------------------------------ what to say


def read_requests(cfg):
    """[Request] from --text or --input. Wrong lines are all named at once."""
    if bool(cfg.text) == bool(cfg.input):
        raise Usage("give either --text or --input")
    if cfg.output_dir and not cfg.input or cfg.output != Infer.output and cfg.input:
        raise Usage("--output names the file of --text, --output_dir the folder for those of --input")
    if cfg.batch_size < 1 or cfg.max_audio_length_ms < 0:
        raise Usage(f"batch_size is {cfg.batch_size}, expected at least 1; max_audio_length_ms is "
                    f"{cfg.max_audio_length_ms}, at least 0")
    if cfg.max_chars_per_piece < 0 or not 0 <= cfg.pause <= LONGEST_PAUSE:
        raise Usage(f"max_chars_per_piece is {cfg.max_chars_per_piece}, expected at least 0; "
                    f"pause is {cfg.pause}, expected 0 to {LONGEST_PAUSE} seconds")
    if cfg.trim_end >= 0 and cfg.output == "-":
        raise Usage("--trim_end hears a sound to its end, and --output - gives it away before; write a file")
    keys = ("prompt_audio", "prompt_text", "reference_audio", "speaker", "seed")
    flags = {key: getattr(cfg, key) for key in keys}
    flags["lora"] = cfg.lora
    flags["context"] = read_context(cfg.context)
    if cfg.input:
        return read_input(cfg, flags)
    item = {"text": cfg.text, **flags}
    problem = wrong_name(cfg.output) or wrong_request(item, cfg.output)
    if problem:
        raise Usage(problem)
    return [Request(cfg.output, item)]


LONGEST_TEXT_SHOWN = 80  # characters
LONGEST_PROBLEM = 400  # characters: a line may hold a whole book


def read_input(cfg, flags):
    """The requests of an --input file; a line that does not say something takes it from the flags."""
    path, folder = Path(cfg.input), Path(cfg.output_dir or ".")
    requests, wrong = [], []
    for number, line in numbered_lines(path):
        item, problem = read_line(line, flags, path.suffix in (".jsonl", ".json"))
        if not problem:
            name = str(item.pop("output", f"output_{len(requests) + 1:03d}.wav"))
            target = folder / name
            problem = wrong_name(name) or outside(target, folder) or wrong_request(item, target)
        if problem:
            wrong.append(f"{path} line {number}: {shown(problem, LONGEST_PROBLEM)}")
        else:
            requests.append(Request(str(target), item))
    names = [Path(request.output).resolve() for request in requests]
    twice = sorted({name for name in names if names.count(name) > 1})
    wrong += [f"{path}: output {name} is named twice" for name in twice]
    if wrong:
        raise Usage("\n".join(wrong))
    if not requests:
        raise Usage(f"{path} holds no sentence")
    return requests


def numbered_lines(path):
    """[(number, line)] of a text file, without empty ones."""
    if not path.is_file():
        raise Usage(f"--input: no file at {path}")
    try:
        text = read_bytes(path, LARGEST_JSON).decode("utf-8-sig")
    except UnicodeDecodeError as e:
        place = f"{e.reason} at byte {e.start}"
        raise Usage(f"--input: {path} is not UTF-8 ({place}); save it as UTF-8") from None
    lines = text.split("\n")  # a text may hold other line separators
    return [(number, line) for number, line in enumerate(lines, 1) if line.strip()]


def read_line(line, flags, is_json):
    """(item, None) of a line with the flags for what it does not say, or (None, what is wrong with it)."""
    if not is_json:
        return {**flags, "text": line.strip()}, None
    try:
        item = parse(line, "it")
    except Invalid as e:
        return None, str(e)
    keys = {"output", *flags}
    if not isinstance(item, dict) or not item.get("text") or set(item) - keys - {"text"}:
        return None, f"expected an object with text and any of {', '.join(sorted(keys))}"
    item = {key: value for key, value in item.items() if value is not None}
    if "speaker" in item:
        item["speaker"] = str(item["speaker"])
    if "lora" in item:
        item["lora"], problem = read_lora(item["lora"])
        if problem:
            return None, problem
    if "prompt_audio" in item or "prompt_text" in item:  # another recording says something else
        item = {"prompt_audio": "", "prompt_text": "", **item}
    return {**flags, **item}, None


def read_lora(specs):
    """(the adapters that a line names, None), or (None, what is wrong with them)."""
    if isinstance(specs, str):
        specs = [specs] if specs else []  # "": the base alone, whatever --lora says
    known = isinstance(specs, list) and all(isinstance(spec, str) and spec for spec in specs)
    if not known or "\0" in "".join(specs):
        return None, f"lora is {specs!r}, expected an adapter folder, with :strength if not 1, or a list"
    try:
        for spec in specs:
            adapters.locate(split_strength(spec)[0])
    except (Usage, Invalid) as e:
        return None, f"lora: {e}"
    return specs, None


def read_context(path):
    """The turns of a --context file: a JSON list, or one object per line; audio may be relative to it."""
    if not path:
        return []
    try:
        text = read_bytes(path, LARGEST_JSON).decode("utf-8-sig")
        if text.lstrip().startswith("["):
            turns = parse(text, path)
        else:
            turns = [parse(line, path) for line in text.splitlines() if line.strip()]
    except (UnicodeDecodeError, Invalid) as e:
        raise Usage(f"--context {path}: {e}; expected a JSON list of turns, or one per line") from None
    for turn in turns:
        if isinstance(turn, dict) and isinstance(turn.get("audio"), str):
            near = Path(path).parent / turn["audio"]
            if near.is_file() and not Path(turn["audio"]).is_file():
                turn["audio"] = str(near)
    return turns


LARGEST_SEED = 2**62  # tries add to it, and torch's generators take 64 bits


def wrong_name(output):
    """What is wrong with the name of a file to write, or None."""
    if not output.isprintable() or output.endswith("/"):
        return f"output {output!r}: expected the name of a file, without control characters"
    try:
        os.fsencode(output)
    except UnicodeEncodeError as e:
        return f"output {output!r}: names of files are {e.encoding} here; set PYTHONUTF8=1"
    return None


def outside(target, folder):
    """What is wrong with a file that is to lie in a folder, or None."""
    if folder.resolve() in target.resolve().parents:
        return None
    return f"output {str(target)!r} lies outside {folder}"


def wrong_request(item, output):
    """What is wrong with a line or with the flags, or None."""
    for key, value in item.items():
        if key not in ("seed", "context", "lora") and (not isinstance(value, str) or "\0" in value):
            return f"{key} is {value!r}, expected a text"
    if type(item["seed"]) is not int or abs(item["seed"]) >= LARGEST_SEED:
        return f"seed is {item['seed']!r}, expected a whole number below 2**62"
    if bool(item["prompt_audio"]) != bool(item["prompt_text"]):
        return ("prompt_audio and prompt_text go together: the recording is continued, so its words must be "
                "known. For a voice without transcript use reference_audio, where the checkpoint takes one.")
    turns = item["context"]
    if not isinstance(turns, list) or not all(map(is_turn, turns)):
        return ('context: expected a list of turns such as '
                '{"text": "What was said.", "audio": "said.wav", "speaker": 0}')
    missing = [turn["audio"] for turn in turns if not Path(turn["audio"]).is_file()]
    if missing:
        return f"context: no file at {missing[0]}"
    words = {"text": item["text"]}
    if item["prompt_text"]:
        words["prompt_text"] = item["prompt_text"]
    words |= {f"text of turn {n} in context": turn["text"] for n, turn in enumerate(turns)}
    try:
        for name, text in words.items():
            check_text(one_line(text), name)
    except Invalid as e:
        return str(e)
    if str(output) != "-" and Path(output).suffix.lower() not in (".wav", ".flac"):
        return f"output {str(output)!r}: sound is written as .wav or .flac"
    return None


def is_turn(turn):
    if not isinstance(turn, dict) or set(turn) - {"text", "audio", "speaker"}:
        return False
    return all(isinstance(turn.get(key), str) and turn[key] for key in ("text", "audio"))


def make_folders(requests):
    """The folders of all files, before anything slow."""
    for folder in {Path(request.output).parent for request in requests if request.output != "-"}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sweep(folder, exactly(Path(request.output).name for request in requests))
        except OSError as e:
            raise Invalid(f"{folder}: cannot be made ({e.strerror}); choose another place with --output or "
                          "--output_dir") from None


# ------------------------------------------------------------------------------------------------ speaking


def to_generate(item):
    """The arguments of model.generate from an item; texts are cleaned as those of training are."""
    speaker = item["speaker"] or None
    prompts = []
    if item["reference_audio"]:
        prompts.append((None, item["reference_audio"], None))
    for turn in item["context"]:
        prompts.append((one_line(turn["text"]), turn["audio"], turn.get("speaker")))
    if item["prompt_audio"]:
        # A blank that was typed at its end stays: there are backbones that put the text right behind it.
        behind = " " if item["prompt_text"].endswith(" ") else ""
        prompts.append((one_line(item["prompt_text"]) + behind, item["prompt_audio"], speaker))
    out = dict(text=one_line(item["text"]), prompts=prompts, speaker=speaker, seed=item["seed"])
    return {**out, "lora": item["voice"]} if item.get("voice") else out


def speak(model, requests, sampling):
    """A Take of each request, all generated together."""
    arguments = [to_generate(request.item) for request in requests]
    waves = [[] for _ in requests]
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")  # Python says equal ones once
            for i, chunk in model.generate_batch(arguments, **sampling):
                waves[i].append(chunk)
    except Invalid as e:
        if len(requests) == 1:
            return [Take(requests[0].output, None, None, e)]
        takes = []  # one of them is at fault; alone, the others still become sound
        for request in requests:
            takes += speak(model, [request], sampling)
        return takes
    for warning in caught:  # the model counts its requests, the user knows them by their file
        text = re.sub(r"^request (\d+)", lambda m: requests[int(m[1])].output, str(warning.message))
        say(text)
    waves = [torch.cat(chunks) if chunks else torch.zeros(0) for chunks in waves]
    return [Take(request.output, *rest) for request, *rest in zip(requests, waves, model.finish)]


def pieces_of(request, most):
    """A request for each piece of a long text, with the same output and prompts; else the request itself."""
    text = request.item["text"]
    if not most or len(text) <= most:
        return [request]
    items = [{**request.item, "text": piece.strip()} for piece in sentences.pieces(text, most)]
    return [request._replace(item=item) for item in items]


def joined(takes, rate, pause):
    """One take of those of a text's pieces, with silence between them, or the first that failed."""
    failed = [take for take in takes if take.error]
    if failed:
        return failed[0]
    silence = torch.zeros(round(pause * rate))
    waves = [takes[0].wave]
    for take in takes[1:]:
        waves += [silence, take.wave]
    finish = "cap" if "cap" in [take.finish for take in takes] else takes[-1].finish
    return Take(takes[0].output, torch.cat(waves), finish)


def trimmed(take, rate, keep):
    """(the take, with `keep` seconds behind its last speech at most, seconds that are gone)"""
    if take.error or keep < 0:
        return take, 0.0
    most = math.ceil((measures.end_of_speech(take.wave, rate) + keep) * rate)
    gone = max(0, len(take.wave) - most)
    return take._replace(wave=take.wave[:most]), gone / rate


def write(take, rate):
    """Write a take and print its path; what keeps it from being written is printed, and False returned."""
    try:
        if take.error:
            raise take.error
        audio.write(take.output, take.wave, rate)
    except Invalid as e:
        say(f"{take.output}: {e}")
        return False
    say_cap(take.output, take.finish)
    print(take.output)
    return True


def say_cap(output, finish):
    if finish == "cap":
        say(f"{output}: stopped at the length cap, the model had not ended by itself; if the text is long, "
            "split it (--max_chars_per_piece)")


def stream(model, pieces, sampling, pause):
    """Raw 16-bit samples of a text's pieces to stdout as they come, and how far it is to stderr."""
    started, rate, samples = time.perf_counter(), model.out_sample_rate, 0
    silence = torch.zeros(round(pause * rate))
    for number, piece in enumerate(pieces):
        chunks = model.generate(**to_generate(piece.item), **sampling)
        for chunk in itertools.chain([silence] if number else [], chunks):
            sys.stdout.buffer.write(audio.pcm16(chunk).tobytes())
            sys.stdout.buffer.flush()
            samples += len(chunk)
        say_cap("-", model.finish[0])
        done = progress(number + 1, len(pieces), samples / rate, started)
        print(f"{done} | {rate} Hz", file=sys.stderr)


def progress(done, total, seconds, started):
    """How far it is, how fast against the sound's own time, and how long the rest takes at that pace."""
    spent = time.perf_counter() - started
    factor = f" | real-time factor {spent / seconds:.2f}" if seconds else ""
    left = spent / done * (total - done)
    return f"{done}/{total} | {seconds:.1f} s of audio in {spent:.1f} s{factor} | ETA {left:.0f} s"


def main():
    if HELP & set(sys.argv[1:]):
        show_help(sys.argv[1:])
        return
    cfg, extra = configs.parse(Infer, script="infer", extra=True)

    # All that can be wrong with the command is said before anything slow begins.
    requests = read_requests(cfg)
    voices = voices_of(requests)
    path = checkpoint_of(cfg, list(itertools.chain(*voices.values())))
    sampling = read_sampling(cfg, path, extra)
    check_speakers(requests, voices)
    make_folders(requests)

    # The model with its adapters, and what only it can tell.
    model = load_model(cfg, path, voices)
    name_speakers(requests, voices, model)
    check_words(requests, model)
    if len(voices) > 1:
        for request in requests:
            request.item["voice"] = voice_of(request.item)
    if cfg.max_audio_length_ms:
        frames = cfg.max_audio_length_ms / 1000 * model.frame_rate
        sampling["max_len"] = max(1, math.floor(frames + 1e-6))  # 0.64 s * 6.25 may come out as 3.9999999

    # One text, piece by piece to whoever listens at the other end of the pipe.
    pieces = [pieces_of(request, cfg.max_chars_per_piece) for request in requests]
    if cfg.output == "-":
        stream(model, pieces[0], sampling, cfg.pause)
        return

    # Or files, some sentences at a time. What fails is counted, the others are written. A text of several
    # pieces is written once the last of them was spoken, which may be in a later batch.
    jobs = list(itertools.chain(*pieces))
    started, rate = time.perf_counter(), model.out_sample_rate
    takes, cuts, failed, seconds = [], [], 0, 0.0
    for start in range(0, len(jobs), cfg.batch_size):
        part = jobs[start:start + cfg.batch_size]
        for take in speak(model, part, sampling):
            take, gone = trimmed(take, rate, cfg.trim_end)
            takes.append(take)
            cuts.append(gone)
        while takes and len(takes) >= len(pieces[0]):
            count = len(pieces.pop(0))
            take = joined(takes[:count], rate, cfg.pause)
            del takes[:count]
            if write(take, rate):
                seconds += len(take.wave) / rate
            else:
                failed += 1
        print(progress(start + len(part), len(jobs), seconds, started), file=sys.stderr)
    if cfg.trim_end >= 0:
        count = len([gone for gone in cuts if gone])
        print(f"{count} of {len(cuts)} takes had more than {cfg.trim_end:g} s behind their last speech; "
              f"{sum(cuts):.1f} s are cut", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(requests)} failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    configs.run(main)
