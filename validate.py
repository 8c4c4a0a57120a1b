"""Is a checkpoint sound, does an adapter do anything, which of several is best? One page to look at and hear.

    python validate.py --lora runs/voice/step_* --manifest data/val.jsonl --text "Hello." --output_dir report
    python validate.py --ckpt_dir checkpoints/base runs/full/step_* --text "Hello." --output_dir report

Every checkpoint becomes a column: its files are checked, its adapter is weighed against the base, its losses
are taken with fixed draws, and it speaks the same sentences with the same seeds. The page report.html holds
all of it, with a mode that hides which column is which and takes votes; report.json holds the numbers. No
number here is a quality: the loss often points at another checkpoint than ears do, so listen and choose.

Interrupted, the same command goes on: a column that is done is not made again.
"""
import contextlib
import dataclasses
import json
import math
import re
import shutil
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import torch

import configs
import lora
import models
from configs import Usage, opt
from infer import base_of, parts_of, progress
from models.codecs import campplus
from models.parts import Invalid, adapters, audio, checkpoint, measures, page
from models.parts.plain import an_object, need, read_object, say, sweep, typed, write_file
from models.parts.textfiles import is_file, one_line
from prepare_data import called, hook, read_manifest

# ------------------------------------------------------------------------------------------------ settings


@dataclass
class Validate:
    """Check, measure and compare checkpoints and adapters on one page."""

    lora: list[str] = opt([], "adapter folders to compare, a column each; their base is a column, too", repeat=True)
    ckpt_dir: list[str] = opt([], "with lora: the base; without: checkpoints to compare, the base first", repeat=True)
    extra: dict[str, str] = opt({}, "places of parts kept elsewhere, as --extra.codec DIR; those not given are searched for")
    manifest: list[str] = opt([], "JSONL of rows that were not trained on, for losses and comparison", repeat=True)
    text: list[str] = opt([], "sentences to speak besides those of the manifest", repeat=True)
    rows: int = opt(5, "rows of the manifest that are spoken; the losses take all of them")
    reference_audio: str = opt("", "recording whose voice speaks the sentences of text, for backbones that take one")
    speaker: str = opt("", "who speaks the sentences of text, for backbones that are told")
    output_dir: str = opt("", "folder for report.html, report.json and the clips")
    rank_by: str = opt("", "number by which the columns are ordered, such as loss/total or mel_cepstral_distance")
    copy_best: str = opt("", "folder to which the best column is copied; needs rank_by")
    compare_base: bool = opt(True, "with lora: make a column of the base without an adapter")
    transcriber: str = opt("", "module:function from the path of a wav to its text; gives word and character errors")
    retries: int = opt(2, "further takes, with the next seed, of a sentence that does not end by itself; they are counted")
    seed: int = opt(42, "of every sentence")
    batch_size: int = opt(4, "rows that go through the model together for the losses")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "of the weights: auto is bfloat16 on CUDA and float32 elsewhere")
    ignore_base: bool = opt(False, "compare adapters although they were trained on another base")


# Numbers of a column: what the page calls them, and which is first when columns are ordered.
LOW, HIGH, NEAR_ONE = "lowest first", "highest first", "nearest to 1 first"
NUMBERS = {
    "difference": ("differs from the base", HIGH),
    "seconds": ("seconds", None),
    "length_ratio": ("length / recording's", NEAR_ONE),
    "characters_per_second": ("characters per second", None),
    "takes": ("takes needed", LOW),
    "ended": ("share that ended by itself", HIGH),
    "silence_at_end": ("silence at the end, s", LOW),
    "level": ("level, dB", None),
    "pitch": ("median pitch, Hz", None),
    "pitch_spread": ("pitch spread, semitones", None),
    "mel_cepstral_distance": ("mel-cepstral distance, dB", LOW),
    "codec_distance": ("distance to the voice in codec space", LOW),
    "campplus_similarity": ("CAM++ similarity to the recordings", HIGH),
    "word_error_rate": ("word error rate", LOW),
    "character_error_rate": ("character error rate", LOW),
}
CAMPPLUS, CAMPPLUS_RATE = "campplus_cn_common.bin", 16000  # its published file, and Hz of what it hears
SHORTEST = 0.1  # seconds of which spectra, and a voice, can be told
USUAL_LENGTH = 0.8, 1.25  # of speech, as a share of the recordings'; a voice learns its pace, too
COMPARED_FRAMES = 50  # steps of a sentence that show the effect of an adapter: four seconds, enough to differ
REPORT, PAGE = "report.json", "report.html"


@dataclass
class Column:
    """One checkpoint or adapter, and all that is found out about it. What is here goes into report.json."""

    name: str
    path: str = ""
    kind: str = "adapter"  # or checkpoint
    is_base: bool = False  # what the others are compared with
    step: int = -1
    key: str = ""  # of the files and settings; a column with the same key need not be made again
    problems: list[str] = field(default_factory=list)  # texts; empty means sound
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)  # texts: what speaks against it, beside the base
    groups: list[list] = field(default_factory=list)  # [group of modules, modules, still zero, |BA| / |W|]
    numbers: dict[str, float] = field(default_factory=dict)  # {name: mean over the sentences, or loss}
    cells: list[dict] = field(default_factory=list)  # one dict per sentence: file, numbers


def check_settings(cfg):
    wrong = []
    if not cfg.output_dir:
        wrong.append("output_dir is not set; give the folder for the report")
    if not cfg.lora and not cfg.ckpt_dir:
        wrong.append("give --lora with adapters, or --ckpt_dir with checkpoints")
    if cfg.lora and len(cfg.ckpt_dir) > 1:
        wrong.append(f"with --lora, --ckpt_dir is their one base; {len(cfg.ckpt_dir)} were given")
    if not cfg.manifest and not cfg.text:
        wrong.append("give --manifest with rows, --text with sentences, or both")
    if cfg.copy_best and not cfg.rank_by:
        wrong.append("copy_best needs rank_by: say by which number the best is told")
    if cfg.copy_best and Path(cfg.copy_best).exists():
        wrong.append(f"copy_best: {cfg.copy_best} exists already; give another folder")
    for name, least in (("rows", 0), ("retries", 0), ("batch_size", 1)):
        if getattr(cfg, name) < least:
            wrong.append(f"{name} is {getattr(cfg, name)}, expected at least {least}")
    if cfg.rank_by and cfg.rank_by not in NUMBERS and not cfg.rank_by.startswith(("loss/", "metric/")):
        orderable = [name for name, (_, order) in NUMBERS.items() if order]
        wrong.append(f"rank_by is {cfg.rank_by!r}; known are loss/total and {', '.join(orderable)}")
    elif cfg.rank_by and better(cfg.rank_by) is None:
        wrong.append(f"rank_by: {cfg.rank_by} is neither better high nor low")
    if wrong:
        raise Usage("\n".join(wrong))


# ------------------------------------------------------------------------------------------------ columns


def step_of(path):
    """The step that a folder says it is of, -1 where it says nothing."""
    index = Path(path) / checkpoint.INDEX
    with contextlib.suppress(Invalid):  # without it, or with a damaged one, the name tells
        return need(read_object(index), "step", int)
    number = re.search(r"(\d+)$", Path(path).resolve().name)
    return int(number[1]) if number else -1


def content_key(path):
    """Sizes and checksums of a checkpoint's files: what was measured of it holds as long as they stay."""
    path = Path(path)
    crc = 0
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.name not in ("optimizer.pth", "scheduler.pth"):
            crc = zlib.crc32(f"{file.name} {checkpoint.checksum(file)}".encode(), crc)
    return f"{crc:08x}"


def find_columns(cfg, base):
    """The columns in the order of their steps; a base without adapter comes first."""
    paths = cfg.lora or cfg.ckpt_dir
    missing = [path for path in paths if not Path(path).exists()]
    if missing:
        raise Usage(f"nothing at {', '.join(missing)}")
    kind = "adapter" if cfg.lora else "checkpoint"
    columns = [Column(short_name(path, paths), str(path), kind, step=step_of(path)) for path in paths]
    if not cfg.lora:
        columns[0].is_base = True
        return columns
    columns.sort(key=lambda column: column.step)
    first = [Column("base", str(base), "checkpoint", is_base=True)] if cfg.compare_base else []
    return [*first, *columns]


def short_name(path, paths):
    """The last part of a path, or more of it where two paths end alike."""
    parts = Path(path).parts
    for count in range(1, len(parts) + 1):
        name = "/".join(parts[-count:])
        if sum("/".join(Path(other).parts[-count:]) == name for other in paths) == 1:
            return name
    return str(path)


# ------------------------------------------------------------------------------------------------ sound?


def check_files(column):
    """What the index of a step folder says of its files, and which tool wrote them."""
    path = Path(column.path)
    if (path / checkpoint.INDEX).is_file():
        wrong = checkpoint.check_step(path)
        if wrong:
            column.problems.append(wrong)
        column.notes.append("written by train.py, with an index of its files")
    elif column.kind == "adapter":
        record = adapters.read_record(path)
        column.notes.append("written here, without an index" if record else "written by another tool")


def put_on(model, column, cfg):
    """Switch the model to a column's adapter. False where it does not load; why is in its problems."""
    try:
        _, skipped = lora.load_lora_weights(model, column.path, cfg.ignore_base)
    except Invalid as error:
        column.problems.append(str(error))
        return False
    if skipped:
        column.notes.append(f"{len(skipped)} tensors do nothing here: {', '.join(skipped[:3])}")
    column.problems += not_finite(lora.get_lora_state_dict(model))
    column.groups = weigh(model)
    return not column.problems


def not_finite(tensors):
    """Texts that name tensors with NaN or infinity."""
    return [f"{name} holds NaN or infinity" for name, value in tensors.items() if not value.isfinite().all()]


@torch.no_grad()
def weigh(model):
    """[group, modules, still zero, |scale B A| / |W|] for each kind of layer in each stack of layers.

    |BA| is computed from the r x r products of A and of B, which need no matrix of the layer's size.
    """
    groups = {}
    for name, module in lora.lora_modules(model).items():
        A, B = module.lora_A.double(), module.lora_B.double()
        update = float(module.lora_scale) * (B.T @ B * (A @ A.T)).sum().clamp(min=0).sqrt()
        weight = torch.linalg.vector_norm(module.weight.double())
        stack, _, rest = re.sub(r"\.\d+\.", " ", name).rpartition(".")
        groups.setdefault(f"{stack} {rest}".strip(), []).append((float(update), float(weight)))
    return [[group, len(norms), sum(update == 0 for update, _ in norms),
             math.hypot(*(update for update, _ in norms)) / math.hypot(*(weight for _, weight in norms))]
            for group, norms in groups.items()]


def first_frames(model, request, sampling, seed):
    """The first steps of a sentence before the codec, flat, since some models yield whole segments."""
    frames = []
    for frame in model.frames(**{**sampling, **request}, seed=seed):
        frames.append(frame.flatten())
        if len(frames) == COMPARED_FRAMES:
            break
    return torch.cat(frames) if frames else torch.zeros(0)


def difference(frames, base):
    """How far two series of frames lie apart: share of other codes, or relative distance of latents."""
    n = min(len(frames), len(base))
    if not n:
        return float(len(frames) != len(base))
    a, b = frames[:n], base[:n]
    if a.is_floating_point():
        return float((a - b).abs().mean() / b.abs().mean().clamp(min=1e-12))
    return float((a != b).double().mean())


# ------------------------------------------------------------------------------------------------ losses


@torch.no_grad()
def losses(model, examples, batch_size):
    """Means over all rows with fixed draws and nothing dropped; loss/total weighs them as training does."""
    order = sorted(range(len(examples)), key=lambda i: model.length(examples[i]))
    sums, counts = {}, {}
    for start in range(0, len(order), batch_size):
        batch, n = model.collate([examples[i] for i in order[start : start + batch_size]])
        batch = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in batch.items()}
        for name, value in model(batch).items():
            sums[name] = sums.get(name, 0.0) + value.item()
            counts[name] = counts.get(name, 0) + n[name]
    means = {name: value / max(counts[name], 1) for name, value in sums.items()}
    weights = models.backbones()[model.backbone].LAMBDAS
    means = {"loss/total": sum(weights[name] * means[name] for name in weights), **means}
    return {name: value for name, value in means.items() if math.isfinite(value)}  # JSON has no NaN


# ------------------------------------------------------------------------------------------------ speaking


@dataclass
class Sentence:
    """What every column speaks, and the recording of the same words where there is one."""

    text: str
    request: dict  # of model.frames and model.generate, besides sampling and seed
    recording: tuple = ()  # (wave, rate)


def sentences(cfg, model, rows):
    """The sentences of --text and of the first rows; of a conversation the last spoken turn."""
    turns = [turn for turn in map(last_spoken, rows) if turn]
    texts = map(one_line, cfg.text)
    out = [Sentence(text, {"text": text, **voice_for(cfg, model, turns, text)}) for text in texts]
    for turn in map(last_spoken, rows[: cfg.rows]):
        if turn is None:
            continue
        recording = audio.read(turn["audio"], None, turn.get("start"), turn.get("end"))
        out.append(Sentence(turn["text"], {"text": turn["text"], **model.sample_request(turn)}, recording))
    return out


def last_spoken(row):
    """The row itself, or the last turn of a conversation, with audio and text; None where there is none."""
    turns = row.get("turns", [row])
    return next((turn for turn in reversed(turns) if turn.get("audio") and turn.get("text")), None)


def voice_for(cfg, model, turns, text):
    """Who speaks a sentence of --text: as the flags say, else the voice of the first row."""
    request = model.sample_request({**turns[0], "text": text}) if turns else {}
    if cfg.reference_audio:
        request["prompts"] = [(None, cfg.reference_audio, None)]
    if cfg.speaker:
        request["speaker"] = cfg.speaker
    return request


def take(model, sentence, sampling, cfg):
    """(wave, takes, ended): further takes with the next seed until one ends by itself and is not empty."""
    for attempt in range(cfg.retries + 1):
        chunks = list(model.generate(**{**sampling, **sentence.request}, seed=cfg.seed + attempt))
        wave = torch.cat(chunks) if chunks else torch.zeros(0)
        ended = model.finish[0] == "end"
        if ended and len(wave):
            break
    return wave, attempt + 1, ended


def measure(wave, rate, sentence):
    """Numbers of one clip; those that need a recording only where there is one."""
    median, spread = measures.pitch_facts(wave, rate)
    seconds = len(wave) / rate
    out = {"seconds": seconds, "pitch": median, "pitch_spread": spread, "level": measures.level(wave),
           "silence_at_end": measures.silence_at_end(wave, rate)}
    if seconds:
        out["characters_per_second"] = len(sentence.text) / seconds
    if sentence.recording and seconds > SHORTEST:
        recording, recorded_rate = sentence.recording
        out["length_ratio"] = seconds / (len(recording) / recorded_rate)
        out["mel_cepstral_distance"] = measures.mel_cepstral_distance(wave, rate, recording, recorded_rate)
    return {name: value for name, value in out.items() if math.isfinite(value)}  # silence has no pitch


def coded(model, waves):
    """What the codec makes of several clips, one behind the other: latents (T, D), or codes (T, K)."""
    frames = [model.codec.encode(wave) for wave in waves]
    if frames[0].is_floating_point():
        return torch.cat(frames).double()
    return torch.cat(frames, 1).T


def codec_distance(spoken, voice):
    """How far two voices lie apart in the codec's space.

    Of latents: the distance of their means in units of the voice's spread, root mean square. Of codes: half
    the sum of the differences of their shares, mean over codebooks; 0 for the same, 1 for no code in common.
    """
    if voice.is_floating_point():
        spread = voice.std(0).clamp(min=1e-6)
        return float(((spoken.mean(0) - voice.mean(0)) / spread).square().mean().sqrt())
    size = 1 + int(max(spoken.max(), voice.max()))
    distances = []
    for ours, theirs in zip(spoken.T, voice.T):
        a = torch.bincount(ours, minlength=size).double() / len(ours)
        b = torch.bincount(theirs, minlength=size).double() / len(theirs)
        distances.append(float((a - b).abs().sum()) / 2)
    return sum(distances) / len(distances)


def read_ears(extra):
    """CAM++ where --extra.campplus names its weights, else None. It hears clips of any backbone."""
    if "campplus" not in extra:
        return None
    path = models.folder_of(extra["campplus"])
    return campplus.load(path / CAMPPLUS if path.is_dir() else path)


def parts_for(cfg, base):
    """What to load a base with. To a backbone that does not keep CAM++ for itself it is an unknown part."""
    parts = parts_of(cfg, [] if cfg.ckpt_dir else [(cfg.lora[0], 1.0)])
    if "campplus" not in getattr(models.find(base), "PARTS", {}):
        parts.pop("campplus", None)
    return parts


def voice_of(ears, clips):
    """What CAM++ makes of the voice of several clips (wave, rate): (size,) of length 1, or None."""
    clips = [(wave, rate) for wave, rate in clips if len(wave) > SHORTEST * rate]
    if ears is None or not clips:
        return None
    seen = [ears.embed(audio.resample(wave, rate, CAMPPLUS_RATE)) for wave, rate in clips]
    mean = torch.stack([direction / direction.norm() for direction in seen]).mean(0)
    return mean / mean.norm()


def speak(model, column, plan, cfg):
    """Let a column speak every sentence: a cell with file and numbers for each, the means as its own."""
    folder = Path(cfg.output_dir) / "clips" / column.key
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, r"\d{3,}\.flac")
    waves = []
    for number, sentence in enumerate(plan.sentences):
        wave, takes, ended = take(model, sentence, plan.sampling, cfg)
        file = folder / f"{number:03d}.flac"
        audio.write(file, wave, model.out_sample_rate)
        cell = {"file": str(file.relative_to(cfg.output_dir)), "takes": takes, "ended": float(ended)}
        cell |= measure(wave, model.out_sample_rate, sentence)
        ours = voice_of(plan.ears, [(wave, model.out_sample_rate)])
        if ours is not None and plan.speaker is not None:
            cell["campplus_similarity"] = float(ours @ plan.speaker)
        if plan.transcriber:
            transcript = called(plan.transcriber, str(file), "transcriber")
            cell["transcript"] = transcript
            cell["word_error_rate"] = measures.word_error_rate(sentence.text, transcript)
            cell["character_error_rate"] = measures.character_error_rate(sentence.text, transcript)
        column.cells.append(cell)
        waves.append(audio.resample(wave, model.out_sample_rate, model.sample_rate))
    for name in NUMBERS:
        values = [cell[name] for cell in column.cells if name in cell]
        if values:
            column.numbers[name] = sum(values) / len(values)
    waves = [wave for wave in waves if len(wave)]
    if plan.voice is not None and waves:
        column.numbers["codec_distance"] = codec_distance(coded(model, waves), plan.voice)


@dataclass
class Plan:
    """What is the same for every column."""

    sentences: list
    sampling: dict
    examples: list
    voice: torch.Tensor | None  # what the codec makes of the recordings
    base_frames: torch.Tensor | None  # of the first sentence by the base
    transcriber: object
    ears: campplus.CAMPPlus | None
    speaker: torch.Tensor | None  # what they make of the recordings


def examine(model, column, plan, cfg):
    """Everything about one column whose weights are in the model."""
    if plan.sentences and not column.is_base:
        frames = first_frames(model, plan.sentences[0].request, plan.sampling, cfg.seed)
        column.numbers["difference"] = difference(frames, plan.base_frames)
    if plan.examples:
        column.numbers |= losses(model, plan.examples, cfg.batch_size)
    if plan.sentences:
        speak(model, column, plan, cfg)


# ------------------------------------------------------------------------------------------------ the page


def verdict(column):
    """What the first table says of a column, in words."""
    if column.problems:
        return "; ".join(column.problems)
    if column.kind == "adapter" and column.numbers.get("difference") == 0:
        return "this adapter does nothing: the output is the base's to the last bit"
    return "sound"


def doubts_of(column, base):
    """Texts: in what a column is no better than the base, or unlike the recordings. None where all is well.

    These are differences that no good fine-tune shows; what a number has to be, nobody can say.
    """
    ours, before, told = column.numbers, base.numbers, []
    if no_lower("loss/total", ours, before):
        told.append(f"its loss on the rows, {ours['loss/total']:.4g}, is no lower than the base's, "
                    f"{before['loss/total']:.4g}")
    if no_lower("mel_cepstral_distance", ours, before):
        told.append("it sounds no more like the recordings than the base does (mel-cepstral distance)")
    ratio = ours.get("length_ratio", 1.0)
    if not USUAL_LENGTH[0] <= ratio <= USUAL_LENGTH[1]:
        told.append(f"its sentences last {ratio:.2f} times as long as the recordings of the same words")
    if ours.get("ended", 1.0) < before.get("ended", 1.0):
        told.append(f"{1 - ours['ended']:.0%} of its sentences do not end by themselves, of the base's "
                    f"{1 - before['ended']:.0%}")
    return told


def no_lower(name, ours, before):
    return name in ours and name in before and ours[name] >= before[name]


def better(name):
    """Which end of a number comes first: losses low, accuracies high, None where it orders nothing."""
    if name in NUMBERS:
        return NUMBERS[name][1]
    return HIGH if "accuracy" in name else LOW


def order_of(columns, name):
    """The columns that have a number, best first; ties by the earlier step."""
    def score(column):
        value = column.numbers[name]
        if better(name) == NEAR_ONE:
            return abs(math.log(max(value, 1e-9)))  # half as long is as far off as twice as long
        return -value if better(name) == HIGH else value

    having = [column for column in columns if name in column.numbers]
    return sorted(having, key=lambda column: (score(column), column.step))


def number_names(columns):
    """Losses first, then what is measured of the sound, as far as any column has them."""
    names = list(dict.fromkeys(name for column in columns for name in column.numbers))
    rest = [name for name in names if name not in NUMBERS]
    return [*rest, *(name for name in NUMBERS if name in names)]


def named(column):
    """A column's name, which the blind mode hides."""
    return page.Piece(f'<span class="column">{page.escape(column.name)}</span>')


def first_of(columns, name):
    """The column that is first by a number, None where it orders nothing or is the same for all."""
    if better(name) is None:
        return None
    ranked = order_of(columns, name)
    values = {column.numbers[name] for column in ranked}
    return ranked[0] if len(values) > 1 else None


def numbers_table(columns):
    """A row for each number, a cell for each column; the first of a row is marked."""
    rows = []
    for name in number_names(columns):
        first = first_of(columns, name)
        cells = [NUMBERS.get(name, (name,))[0]]
        for column in columns:
            value = column.numbers.get(name)
            shown = "" if value is None else page.escape(page.number(float(value)))
            cells.append(page.Piece(f"<b>{shown} *</b>" if column is first else shown))
        rows.append(cells)
    return page.table(["number", *(named(column) for column in columns)], rows)


def clip_of(cfg, cell):
    """Player and picture of a clip."""
    path = Path(cfg.output_dir) / cell["file"]
    wave, rate = audio.read(path)
    player = page.sound(path.read_bytes(), "audio/flac")
    return page.Piece(player + page.picture(audio.mel_picture(wave, rate)[0]))


def sentence_section(cfg, columns, number, sentence):
    """One sentence: a box for every column, with what was measured of the clip."""
    boxes = []
    if sentence.recording:
        wave, rate = sentence.recording
        picture = page.picture(audio.mel_picture(wave, rate)[0])
        boxes.append(f'<div class="clip"><b>recording</b>{page.player(wave, rate)}{picture}</div>')
    for column in columns:
        if number < len(column.cells):
            boxes.append(cell_box(cfg, column, column.cells[number]))
    return page.section(f"{number + 1}. {sentence.text}", page.grid(*boxes))


def cell_box(cfg, column, cell):
    """A clip with its column's name, its picture and its numbers; the script finds it by `vote`."""
    facts = [f"{NUMBERS[name][0]} {page.number(float(cell[name]))}" for name in NUMBERS if name in cell]
    if "transcript" in cell:
        facts.append(f"transcript: {cell['transcript']}")
    name, numbers = page.escape(column.name), page.text("; ".join(facts), quiet=True)
    return (f'<div class="clip vote" data-column="{name}"><b class="column">{name}</b>{clip_of(cfg, cell)}'
            f"<details><summary>numbers</summary>{numbers}</details></div>")


def write_page(cfg, columns, plan):
    """report.html: verdicts, numbers, what the adapters changed, and every clip, all in one file."""
    sound = []
    for column in columns:
        doubts, notes = "; ".join(column.doubts), "; ".join(column.notes)
        sound.append([named(column), column.kind, verdict(column), doubts, notes])
    groups = [[named(column), *group] for column in columns for group in column.groups]
    note = page.text("* is the first of its row by that number alone. None of them is a quality.")
    pieces = [page.section("Sound?", page.table(["column", "kind", "verdict", "doubts", "notes"], sound)),
              page.section("Which?", note, numbers_table(columns)),
              page.section("Blind", BLIND)]
    pieces += [sentence_section(cfg, columns, i, sentence) for i, sentence in enumerate(plan.sentences)]
    if groups:
        headers = ["column", "modules", "count", "still zero", "|BA| / |W|"]
        pieces.append(page.section("What the adapters change", page.table(headers, groups)))
    text = page.page("Checkpoints side by side", *pieces, LOOKS, SCRIPT)
    page.write(Path(cfg.output_dir) / PAGE, text)


def write_report(cfg, columns, ranking=()):
    """report.json: all numbers, and the key of each column, by which the next run knows what is done."""
    made = [dataclasses.asdict(column) for column in columns]
    report = {"ranked_by": cfg.rank_by or None, "ranking": list(ranking), "columns": made}
    text = json.dumps(report, indent=1, ensure_ascii=False)
    write_file(Path(cfg.output_dir) / REPORT, text.encode("utf-8", "backslashreplace") + b"\n")


# A listener hears two columns of one sentence without their names and votes. The tally shows how sure it is:
# Wilson's interval for the share of a column's votes that it won.
BLIND = """<p>Hear two columns without knowing which is which. Keys: <b>1</b> and <b>2</b> play, <b>a</b> the
first is better, <b>b</b> the second is better, <b>0</b> no difference.</p>
<p><button id="start">Start</button> <span id="round" class="quiet"></span></p>
<div id="pair" class="grid" hidden><div class="clip"><b>first</b><audio controls id="one"></audio></div>
<div class="clip"><b>second</b><audio controls id="two"></audio></div></div>
<p id="ask" hidden><button data-vote="1">first is better (a)</button>
<button data-vote="0">no difference (0)</button>
<button data-vote="2">second is better (b)</button> <button id="stop">Stop and show names</button></p>
<div id="tally" class="wide"></div>"""
LOOKS = """<style>
.clip b { display: block } .clip img { width: 100%; height: 80px; border-radius: 4px }
[hidden] { display: none !important } body.blind .vote, body.blind .column { visibility: hidden }
button { font: inherit; padding: 4px 10px; margin: 2px }
</style>"""
SCRIPT = """<script>
(() => {
  const $ = id => document.getElementById(id), votes = {};
  let pair = null, round = 0;
  const sections = [...document.querySelectorAll("section")];
  const rows = sections.map(s => [...s.querySelectorAll(".vote")]).filter(r => r.length > 1);
  if (!rows.length) {
    $("start").disabled = true; $("round").textContent = "needs two columns that speak"; return;
  }
  const any = list => list[Math.floor(Math.random() * list.length)];
  function next() {
    const row = any(rows), first = any(row), second = any(row.filter(c => c !== first));
    pair = [first.dataset.column, second.dataset.column];
    $("one").src = first.querySelector("audio").src; $("two").src = second.querySelector("audio").src;
    $("round").textContent = `pair ${++round}`;
  }
  function vote(which) {
    if (!pair) return;
    const [a, b] = pair;
    for (const [name, won] of [[a, which === 0 ? 0.5 : which === 1], [b, which === 0 ? 0.5 : which === 2]]) {
      votes[name] ??= [0, 0]; votes[name][0] += Number(won); votes[name][1] += 1;
    }
    next();
  }
  function tally() {
    const z = 1.96, line = ([name, [won, n]]) => {
      const p = won / n, middle = (p + z * z / (2 * n)) / (1 + z * z / n);
      const half = z / (1 + z * z / n) * Math.sqrt(p * (1 - p) / n + z * z / (4 * n * n));
      const [low, high] = [middle - half, middle + half].map(x => (100 * x).toFixed(0));
      return `<tr><td></td><td class="n">${won} of ${n}</td><td class="n">${low} to ${high} %</td></tr>`;
    };
    const list = Object.entries(votes).sort((x, y) => y[1][0] / y[1][1] - x[1][0] / x[1][1]);
    const head = "<thead><tr><th>column</th><th>won</th><th>share, 95 % interval</th></tr></thead>";
    const body = `<tbody>${list.map(line).join("")}</tbody>`;
    $("tally").innerHTML = list.length ? `<table>${head}${body}</table>` : "";
    $("tally").querySelectorAll("tbody tr").forEach((tr, i) => tr.firstChild.textContent = list[i][0]);
  }
  function show(blind) {
    document.body.classList.toggle("blind", blind); $("pair").hidden = $("ask").hidden = !blind;
    $("start").hidden = blind; pair = null;
    blind ? ($("tally").innerHTML = "", next()) : ($("round").textContent = "", tally());
  }
  $("start").onclick = () => show(true); $("stop").onclick = () => show(false);
  document.querySelectorAll("[data-vote]").forEach(b => b.onclick = () => vote(Number(b.dataset.vote)));
  document.addEventListener("keydown", e => {
    if (!document.body.classList.contains("blind") || e.target.tagName === "AUDIO") return;
    const play = { "1": () => $("one").play(), "2": () => $("two").play() };
    const act = { ...play, a: () => vote(1), b: () => vote(2), "0": () => vote(0) }[e.key];
    if (act) { e.preventDefault(); act(); }
  });
})();
</script>"""


# ------------------------------------------------------------------------------------------------ the run


def earlier_columns(cfg):
    """{key: Column} of a report that lies in the folder, as far as its clips are still there."""
    path = Path(cfg.output_dir) / REPORT
    if not path.is_file():
        return {}
    report = checkpoint.read_json(path)
    if not isinstance(report, dict) or not isinstance(report.get("columns"), list):
        raise Usage(f"{path} is no report of validate.py; give another output_dir")
    done = {}
    for stated in report["columns"]:
        with contextlib.suppress(Invalid):  # another version wrote it, or a hand
            column = typed(Column, an_object(stated, path))
            files = [need(cell, "file", str) for cell in column.cells]
            if column.key and all(is_file(Path(cfg.output_dir) / file) for file in files):
                done[column.key] = column
    return done


def make_plan(cfg, model, rows, sampling, ears):
    """What every column is asked, worked out once on the base."""
    examples = [model.encode(row) for row in rows]
    examples = [example for example in examples if model.length(example)]
    spoken = sentences(cfg, model, rows)
    recordings = [audio.resample(*s.recording, model.sample_rate) for s in spoken if s.recording]
    voice = coded(model, recordings) if recordings else None
    frames = first_frames(model, spoken[0].request, sampling, cfg.seed) if spoken else None
    transcriber = hook(cfg.transcriber, "transcriber", "my_ears:transcribe") if cfg.transcriber else None
    clips = [s.recording for s in spoken if s.recording]
    if cfg.reference_audio:
        clips.append(audio.read(cfg.reference_audio))
    return Plan(spoken, sampling, examples, voice, frames, transcriber, ears, voice_of(ears, clips))


def key_of(cfg, column, sampling, base):
    """Names the files of a column and everything that its numbers depend on."""
    asked = [content_key(path) for path in cfg.manifest]
    names = ("extra", "text", "rows", "reference_audio", "speaker", "seed", "retries", "transcriber", "dtype")
    settings = [getattr(cfg, name) for name in names]
    return f"{content_key(column.path)}-{zlib.crc32(repr((base, asked, settings, sampling)).encode()):08x}"


def main():
    cfg, flags = configs.parse(Validate, script="validate", extra=True)
    check_settings(cfg)
    base = cfg.ckpt_dir[0] if cfg.ckpt_dir else base_of(cfg.lora[0])
    columns = find_columns(cfg, base)
    nearby = [f.name for f in dataclasses.fields(Validate)]
    sampling = dataclasses.asdict(configs.build(models.find(base).Sampling, flags, "--", nearby))
    sampling.pop("retries", None)  # takes are counted here
    rows = read_manifest(cfg.manifest) if cfg.manifest else []
    Path(cfg.output_dir).mkdir(parents=True, exist_ok=True)
    done = earlier_columns(cfg)

    # The base is loaded once, and adapters are switched on it; full checkpoints are loaded one by one.
    device = models.pick_device(cfg.device)
    dtype = models.pick_dtype(cfg.dtype, device)
    ears, extra = read_ears(cfg.extra), parts_for(cfg, base)
    model = models.load(base, device, dtype, extra=extra)
    model.codec.to(device)
    plan = make_plan(cfg, model, rows, sampling, ears)
    started, finished = time.perf_counter(), []
    for number, column in enumerate(columns, 1):
        column.key = key_of(cfg, column, sampling, model.fingerprint if cfg.lora else base)
        if column.key in done:
            finished.append(dataclasses.replace(done[column.key], name=column.name, path=column.path))
            say(f"{number}/{len(columns)} {column.name}: as it was measured before")
            continue
        check_files(column)
        if column.kind == "adapter":
            able = not column.problems and put_on(model, column, cfg)
        else:
            model, able = other_checkpoint(model, column, device, dtype, extra)
        if able:
            examine(model, column, plan, cfg)
        finished.append(column)
        write_report(cfg, [*finished, *columns[number:]])
        seconds = sum(cell["seconds"] for cell in column.cells)
        line = progress(number, len(columns), seconds, started)
        say(f"{column.name}: {verdict(column)} | {line}")

    ranking = [column.name for column in order_of(finished, cfg.rank_by)] if cfg.rank_by else []
    if cfg.rank_by and not ranking:
        names = ", ".join(number_names(finished)) or "no numbers"
        raise Invalid(f"rank_by: no column has {cfg.rank_by}; they have {names}")
    base_column = next((column for column in finished if column.is_base), None)
    for column in finished:
        if base_column and not column.is_base:
            column.doubts = doubts_of(column, base_column)
        for doubt in column.doubts:
            say(f"{column.name}: {doubt}")
    write_report(cfg, finished, ranking)
    write_page(cfg, finished, plan)
    if ranking:
        say(f"by {cfg.rank_by}: {', '.join(ranking)}")
    if cfg.copy_best:
        best = next(column for column in finished if column.name == ranking[0])
        shutil.copytree(Path(best.path).resolve(), cfg.copy_best)
        say(f"copied {best.path} to {cfg.copy_best}")
    print(Path(cfg.output_dir) / PAGE)
    return 1 if any(column.problems for column in finished) else 0


def other_checkpoint(model, column, device, dtype, extra):
    """(model, whether it can be used): another full checkpoint in place of the one that was there."""
    if model.path == column.path:
        column.problems += not_finite(dict(model.named_parameters()))
        return model, not column.problems
    try:
        new = models.load(column.path, device, dtype, extra=extra)
    except Invalid as error:
        column.problems.append(str(error))
        return model, False
    new.codec.to(device)
    column.problems += not_finite(dict(new.named_parameters()))
    return new, not column.problems


if __name__ == "__main__":
    configs.run(main)
