"""Text in, wav out: one sentence, a file of sentences, a voice to clone, adapters by path and strength.

    python infer.py --ckpt_dir checkpoints/base --lora runs/voice/latest --text "Hello." --output hello.wav
    python infer.py --lora runs/voice/latest:0.8 --input sentences.txt --output_dir out

With --lora alone the base is the one that the adapter records. Fields of the backbone's Sampling are flags too
(--temperature, --cfg_value, ...). Paths of finished files go to stdout, everything else to stderr.
"""
import dataclasses
import json
import math
import re
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

import configs
import lora
import models
from configs import Usage, opt
from models.parts import Invalid, adapters, audio, checkpoint


@dataclass
class Infer:
    """Speak with a checkpoint, with or without adapters."""

    ckpt_dir: str = opt("", "folder of the checkpoint, or org/name in the local hub cache; empty takes the adapter's base")
    lora: list[str] = opt([], "adapter folder, with :strength if not 1; several are added up", repeat=True)
    config: str = opt("", "training YAML: its pretrained_path is the checkpoint where ckpt_dir is not given")
    text: str = opt("", "what to say")
    output: str = opt("output.wav", "wav file to write; - streams raw 16-bit samples to stdout as they come")
    input: str = opt("", "file of sentences, one per line, or JSONL with text and output, prompt_audio, prompt_text, speaker, seed, context")
    output_dir: str = opt("", "folder for the files of --input: output_001.wav and so on, or the names in the JSONL")
    batch_size: int = opt(4, "sentences of --input that are generated together")
    prompt_audio: str = opt("", "recording to continue in the same voice; needs prompt_text")
    prompt_text: str = opt("", "transcript of prompt_audio")
    context: str = opt("", "JSON list or JSONL of earlier turns, oldest first: {text, audio, speaker}; for backbones that hear conversations")
    reference_audio: str = opt("", "recording whose voice is taken, without transcript, for backbones that can")
    speaker: str = opt("", "name of a speaker of the training data, for backbones that are told who speaks")
    max_audio_length_ms: int = opt(0, "length at most, instead of max_len; 0 is off")
    seed: int = opt(42, "of every draw")
    device: str = opt("auto", "auto, cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "of the weights: auto is bfloat16 on CUDA and float32 elsewhere")
    compile: bool = opt(False, "torch.compile every layer: faster after a slow start")
    ignore_base: bool = opt(False, "load an adapter although it was trained on another base")
    allow_unused_tensors: bool = opt(False, "load a checkpoint although some of its tensors have no place in the model")


def split_strength(spec):
    """'folder:0.5' -> ('folder', 0.5); a path that exists as it stands has strength 1."""
    path, colon, number = spec.rpartition(":")
    if not colon or Path(spec).exists():
        return spec, 1.0
    try:
        strength = float(number)
    except ValueError:
        return spec, 1.0
    if not math.isfinite(strength):
        raise Usage(f"--lora {spec}: the strength is {number}, expected a number such as 0.5")
    return path, strength


def base_of(adapter):
    """Where the base of an adapter is, by its record or its config file."""
    _, config, _ = adapters.locate(adapter)
    raw = checkpoint.read_json(config) if config else {}
    raw = raw if isinstance(raw, dict) else {}
    base = adapters.read_record(adapter).get("base") or raw.get("base_model") or raw.get("base_model_name_or_path")
    if not base:
        raise Usage(f"{adapter} does not say which base it belongs to; give it with --ckpt_dir")
    for folder in Path(adapter).resolve().parents:  # a relative path counts from where it was trained: mostly a folder above
        if not Path(base).exists() and (folder / base).exists():
            return str(folder / base)
    try:
        models.folder_of(base)
    except Invalid as e:
        raise Invalid(f"{adapter} belongs to the base {base}: {e}. If that lies elsewhere now, give it with --ckpt_dir.") from None
    return base


def checkpoint_of(cfg, chosen):
    """The checkpoint by --ckpt_dir, else by --config, else by what the first adapter records."""
    if cfg.ckpt_dir:
        return cfg.ckpt_dir
    if cfg.config:
        settings, errors = configs.read(cfg.config)
        names = ("pretrained_path", *configs.ALIASES["train"]["pretrained_path"])
        path = next((str(settings[n]) for n in names if settings.get(n)), "")
        if errors or not path:
            raise Usage("\n".join(errors) or f"{cfg.config} has no pretrained_path; give the checkpoint with --ckpt_dir")
        return path
    if not chosen:
        raise Usage("give --ckpt_dir with the checkpoint, or --lora with an adapter that records its base")
    return base_of(chosen[0][0])


def load_model(cfg, path, chosen):
    """The model with every adapter of [(path, strength)] on; several are stacked."""
    device = models.pick_device(cfg.device)
    model = models.load(path, device, models.pick_dtype(cfg.dtype, device), allow_unused=cfg.allow_unused_tensors)
    if chosen:
        loaded, skipped = lora.load_lora_weights(model, chosen, cfg.ignore_base)
        s, modules = lora.state(model).settings, lora.lora_modules(model)
        scale = f"r {s.r}, alpha {s.alpha:g}, scale {s.scale:g}" if len(chosen) == 1 else f"rank {max(len(m.lora_A) for m in modules.values())} together"
        print(f"adapters: {' + '.join(f'{p} x {x:g}' for p, x in chosen)}: {len(loaded)} tensors in {len(modules)} modules, "
              f"{len(skipped)} skipped; {scale}", file=sys.stderr)
        if skipped:
            print(f"skipped, since it does nothing: {', '.join(skipped[:3])}{' ...' if len(skipped) > 3 else ''}", file=sys.stderr)
        for path, _ in chosen:
            model.speakers = {**getattr(model, "speakers", {}), **adapters.read_record(path).get("speakers", {})}
    if cfg.compile:
        for block in model.blocks():
            block.compile()
    return model


def check_speakers(requests, chosen):
    """A name that no adapter was trained with is an error that lists those it was."""
    known = {name: n for path, _ in chosen for name, n in adapters.read_record(path).get("speakers", {}).items()}
    wrong = sorted({item["speaker"] for _, item in requests if item["speaker"]} - known.keys() - {str(n) for n in known.values()})
    if known and wrong:
        raise Invalid(f"speaker {', '.join(map(repr, wrong))} is not one of those trained: {', '.join(sorted(known))}")


def read_sampling(cfg, path, extra):
    """What generate takes besides the request, from the flags that Infer does not have. Checked before anything is loaded."""
    Sampling = models.find(path).Sampling
    sampling = dataclasses.asdict(configs.build(Sampling, extra, "--", [f.name for f in dataclasses.fields(Infer)]))
    if "retries" not in extra and cfg.output != "-":
        sampling["retries"] = 3  # nobody is waiting for the first chunk, so a runaway take is worth another try
    return sampling


def read_requests(cfg):
    """[(output file, request)] from --text or --input. Wrong lines are all named at once."""
    if bool(cfg.text) == bool(cfg.input):
        raise Usage("give either --text or --input")
    if cfg.output_dir and not cfg.input or cfg.output != Infer.output and cfg.input:
        raise Usage("--output names the file of --text, --output_dir the folder for those of --input")
    if cfg.batch_size < 1 or cfg.max_audio_length_ms < 0:
        raise Usage(f"batch_size is {cfg.batch_size}, expected at least 1; max_audio_length_ms is {cfg.max_audio_length_ms}, at least 0")
    defaults = dict(prompt_audio=cfg.prompt_audio, prompt_text=cfg.prompt_text, reference_audio=cfg.reference_audio,
                    speaker=cfg.speaker, seed=cfg.seed, context=read_context(cfg.context))
    if cfg.text:
        wrong = wrong_request(defaults, cfg.output)
        if wrong:
            raise Usage(wrong)
        return [(cfg.output, {"text": cfg.text, **defaults})]
    path, out, wrong = Path(cfg.input), [], []
    if not path.is_file():
        raise Usage(f"--input: no file at {path}")
    folder = Path(cfg.output_dir or ".")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other line separators
    except UnicodeDecodeError as e:
        raise Usage(f"--input: {path} is not UTF-8 ({e.reason} at byte {e.start}); save it as UTF-8") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        item = {"text": line.strip()}
        if path.suffix in (".jsonl", ".json"):
            try:
                item = json.loads(line)
            except json.JSONDecodeError as e:
                wrong.append(f"{path} line {number}: not valid JSON: {e.msg}")
                continue
            known = {"text", "output", *defaults}
            if not isinstance(item, dict) or not item.get("text") or set(item) - known:
                wrong.append(f"{path} line {number}: expected an object with text and any of {', '.join(sorted(known - {'text'}))}")
                continue
            item = {k: str(v) if k == "speaker" else v for k, v in item.items() if v is not None}
            if "prompt_audio" in item or "prompt_text" in item:  # a new recording does not say what the one before it said
                item = {"prompt_audio": "", "prompt_text": "", **item}
        target = folder / str(item.pop("output", f"output_{len(out) + 1:03d}.wav"))
        item = {**defaults, **item}
        problem = wrong_request(item, target)
        if folder.resolve() not in target.resolve().parents:
            problem = f"output {str(target)!r} lies outside {folder}"
        if problem:
            wrong.append(f"{path} line {number}: {problem}")
        out.append((str(target), item))
    names = [Path(name).resolve() for name, _ in out]
    wrong += [f"{path}: output {n} is named twice" for n in sorted({n for n in names if names.count(n) > 1})]
    if wrong:
        raise Usage("\n".join(wrong))
    if not out:
        raise Usage(f"{path} holds no sentence")
    return out


def read_context(path):
    """The turns of a --context file: a JSON list, or one object per line; their audio may be relative to the file."""
    if not path:
        return []
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        turns = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as e:
        raise Usage(f"--context {path}: {e}; expected a JSON list of turns, or one per line") from None
    near = Path(path).parent
    return [{**t, "audio": str(near / t["audio"]) if not Path(t["audio"]).is_file() and (near / t["audio"]).is_file() else t["audio"]}
            if isinstance(t, dict) and isinstance(t.get("audio"), str) else t for t in turns]


def wrong_request(item, out):
    """What is wrong with a line or with the flags, or None."""
    bad = [k for k, v in item.items() if k not in ("seed", "context") and not isinstance(v, str)]
    if bad or type(item["seed"]) is not int or abs(item["seed"]) >= 2**62:
        return f"{bad[0] if bad else 'seed'} is {item[bad[0] if bad else 'seed']!r}, expected {'a text' if bad else 'a whole number below 2**62'}"
    if bool(item["prompt_audio"]) != bool(item["prompt_text"]):
        return ("prompt_audio and prompt_text go together: the recording is continued, so its words must be known. "
                "For a voice without transcript use reference_audio, where the checkpoint takes one.")
    turns = item["context"]
    if not isinstance(turns, list) or not all(isinstance(t, dict) and set(t) <= {"text", "audio", "speaker"} and all(
            isinstance(t.get(k), str) and t[k] for k in ("text", "audio")) for t in turns):
        return 'context: expected a list of turns such as {"text": "What was said.", "audio": "said.wav", "speaker": 0}'
    missing = [t["audio"] for t in turns if not Path(t["audio"]).is_file()]
    if missing:
        return f"context: no file at {missing[0]}"
    if str(out) != "-" and Path(out).suffix.lower() not in (".wav", ".flac"):
        return f"output {str(out)!r}: sound is written as .wav or .flac"
    return None


def to_request(item):
    """The arguments of model.generate from flags or a JSONL line."""
    prompts = [(None, item["reference_audio"], None)] if item["reference_audio"] else []
    prompts += [(turn["text"], turn["audio"], turn.get("speaker")) for turn in item["context"]]
    prompts += [(item["prompt_text"], item["prompt_audio"], item["speaker"] or None)] if item["prompt_audio"] else []
    return dict(text=item["text"], prompts=prompts, speaker=item["speaker"] or None, seed=item["seed"])


def speak(model, part, sampling):
    """[(output, wave or the Invalid that says why not, how it ended)] of some requests, generated together."""
    try:
        waves = [[] for _ in part]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")  # Python says equal ones once
            for i, chunk in model.generate_batch([to_request(item) for _, item in part], **sampling):
                waves[i].append(chunk)
        for w in said:
            print(re.sub(r"^request (\d+)", lambda m: part[int(m[1])][0], str(w.message)), file=sys.stderr)
        return [(out, torch.cat(w) if w else torch.zeros(0), end) for (out, _), w, end in zip(part, waves, model.finish)]
    except Invalid as e:
        if len(part) > 1:  # find out whose fault it is
            return [one for item in part for one in speak(model, [item], sampling)]
        return [(part[0][0], e, None)]


def make_folders(requests):
    """The folders of all files, before anything slow."""
    for folder in {Path(out).parent for out, _ in requests if out != "-"}:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise Invalid(f"{folder}: cannot be made ({e.strerror}); choose another place with --output or --output_dir") from None


def tell_cap(out, end):
    if end == "cap":
        print(f"{out}: stopped at the length cap, the model had not ended by itself", file=sys.stderr)


def progress(done, total, seconds, started):
    spent = time.perf_counter() - started
    factor = f" | real-time factor {spent / seconds:.2f}" if seconds else ""
    return (f"{done}/{total} | {seconds:.1f} s of audio in {spent:.1f} s{factor} | "
            f"ETA {spent / done * (total - done):.0f} s")


def main():
    cfg, extra = configs.parse(Infer, script="infer", extra=True)
    requests = read_requests(cfg)
    chosen = [split_strength(spec) for spec in cfg.lora]
    path = checkpoint_of(cfg, chosen)
    sampling = read_sampling(cfg, path, extra)
    check_speakers(requests, chosen)
    make_folders(requests)
    model = load_model(cfg, path, chosen)
    speakers = getattr(model, "speakers", {}) if model.speaker_input else {}
    for _, item in requests if len(speakers) == 1 else ():  # trained on one voice: nobody has to say which
        item["speaker"] = item["speaker"] or next(iter(speakers))
    if cfg.max_audio_length_ms:
        sampling["max_len"] = max(1, math.floor(cfg.max_audio_length_ms / 1000 * model.frame_rate + 1e-6))
    failed, started, seconds = 0, time.perf_counter(), 0.0
    if cfg.output == "-":
        for chunk in model.generate(**to_request(requests[0][1]), **sampling):
            sys.stdout.buffer.write(audio.pcm16(chunk).tobytes())
            sys.stdout.buffer.flush()
            seconds += len(chunk) / model.out_sample_rate
        tell_cap("-", model.finish[0])
        print(f"{progress(1, 1, seconds, started)} | {model.out_sample_rate} Hz", file=sys.stderr)
        return
    for start in range(0, len(requests), cfg.batch_size):
        for out, wave, end in speak(model, requests[start : start + cfg.batch_size], sampling):
            try:
                if isinstance(wave, Invalid):
                    raise wave
                audio.write(out, wave, model.out_sample_rate)
            except Invalid as e:
                failed += 1
                print(f"{out}: {e}", file=sys.stderr)
                continue
            seconds += len(wave) / model.out_sample_rate
            tell_cap(out, end)
            print(out)
        print(progress(min(start + cfg.batch_size, len(requests)), len(requests), seconds, started), file=sys.stderr)
    if failed:
        print(f"{failed} of {len(requests)} failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    configs.run(main)
