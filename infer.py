"""Text in, wav out: one sentence, a file of sentences, a voice to clone, adapters by path and strength.

    python infer.py --ckpt_dir checkpoints/base --lora runs/voice/latest --text "Hello." --output hello.wav
    python infer.py --lora runs/voice/latest:0.8 --input sentences.txt --output_dir out

With --lora alone the base is the one that the adapter records. Fields of the backbone's Sampling are flags too
(--temperature, --cfg_value, ...). Paths of finished files go to stdout, everything else to stderr.
"""
import dataclasses
import json
import math
import sys
import time
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
    input: str = opt("", "file of sentences, one per line, or JSONL with text and output, prompt_audio, prompt_text, speaker, seed")
    output_dir: str = opt("", "folder for the files of --input: output_001.wav and so on, or the names in the JSONL")
    batch_size: int = opt(4, "sentences of --input that are generated together")
    prompt_audio: str = opt("", "recording to continue in the same voice; needs prompt_text")
    prompt_text: str = opt("", "transcript of prompt_audio")
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
        return path, float(number)
    except ValueError:
        return spec, 1.0


def base_of(adapter):
    """Where the base of an adapter is, by its record or its config file."""
    record = adapters.read_record(adapter)
    if record.get("base"):
        return record["base"]
    _, config, _ = adapters.locate(adapter)
    raw = checkpoint.read_json(config) if config else {}
    base = raw.get("base_model") or raw.get("base_model_name_or_path")
    if not base:
        raise Usage(f"{adapter} does not say which base it belongs to; give it with --ckpt_dir")
    return base


def load_model(cfg):
    """(model, adapters) with every --lora on; several are stacked."""
    chosen = [split_strength(spec) for spec in cfg.lora]
    path = cfg.ckpt_dir
    if not path and cfg.config:
        path = str(configs.read(cfg.config)[0].get("pretrained_path") or "")
    if not path and chosen:
        path = base_of(chosen[0][0])
    if not path:
        raise Usage("give --ckpt_dir with the checkpoint, or --lora with an adapter that records its base")
    device = models.pick_device(cfg.device)
    model = models.load(path, device, models.pick_dtype(cfg.dtype, device), allow_unused=cfg.allow_unused_tensors)
    if chosen:
        loaded, skipped = lora.load_lora_weights(model, chosen, cfg.ignore_base)
        s = lora.state(model).settings
        print(f"adapters: {' + '.join(f'{p} x {x:g}' for p, x in chosen)}: {len(loaded)} tensors in {len(lora.lora_modules(model))} modules, "
              f"{len(skipped)} skipped; r {s.r}, alpha {s.alpha:g}, scale {s.scale:g}", file=sys.stderr)
    if cfg.compile:
        for block in model.blocks():
            block.compile()
    return model, [p for p, _ in chosen]


def check_speaker(name, chosen):
    """A name that no adapter was trained with is an error that lists those it was."""
    known = sorted({s for path in chosen for s in adapters.read_record(path).get("speakers", [])})
    if name and known and name not in known:
        raise Invalid(f"speaker {name!r} is not one of those trained: {', '.join(known)}")


def read_requests(cfg):
    """[(output file, request)] from --text or --input. Wrong lines are all named at once."""
    if bool(cfg.text) == bool(cfg.input):
        raise Usage("give either --text or --input")
    defaults = dict(prompt_audio=cfg.prompt_audio, prompt_text=cfg.prompt_text, reference_audio=cfg.reference_audio,
                    speaker=cfg.speaker, seed=cfg.seed)
    if cfg.text:
        return [(cfg.output, {"text": cfg.text, **defaults})]
    path, out, wrong = Path(cfg.input), [], []
    if not path.is_file():
        raise Usage(f"--input: no file at {path}")
    folder = Path(cfg.output_dir or ".")
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
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
        target = folder / Path(str(item.pop("output", f"output_{len(out) + 1:03d}.wav")))
        if folder.resolve() not in target.resolve().parents:
            wrong.append(f"{path} line {number}: output {str(target)!r} lies outside {folder}")
        out.append((str(target), {**defaults, **item}))
    names = [name for name, _ in out]
    wrong += [f"{path}: output {n} is named twice" for n in sorted({n for n in names if names.count(n) > 1})]
    if wrong:
        raise Usage("\n".join(wrong))
    if not out:
        raise Usage(f"{path} holds no sentence")
    return out


def to_request(item):
    """The arguments of model.generate from flags or a JSONL line."""
    if bool(item["prompt_audio"]) != bool(item["prompt_text"]):
        raise Invalid("prompt_audio and prompt_text go together: the recording is continued, so its words must be known. "
                      "For a voice without transcript use reference_audio, where the checkpoint takes one.")
    prompts = [(None, item["reference_audio"], None)] if item["reference_audio"] else []
    prompts += [(item["prompt_text"], item["prompt_audio"], item["speaker"] or None)] if item["prompt_audio"] else []
    return dict(text=item["text"], prompts=prompts, speaker=item["speaker"] or None, seed=item["seed"])


def speak(model, part, sampling):
    """[(output, wave or the Invalid that says why not, how it ended)] of some requests, generated together."""
    try:
        waves = [[] for _ in part]
        for i, chunk in model.generate_batch([to_request(item) for _, item in part], **sampling):
            waves[i].append(chunk)
        return [(out, torch.cat(w) if w else torch.zeros(0), end) for (out, _), w, end in zip(part, waves, model.finish)]
    except Invalid as e:
        if len(part) > 1:  # find out whose fault it is
            return [one for item in part for one in speak(model, [item], sampling)]
        return [(part[0][0], e, None)]


def main():
    cfg, extra = configs.parse(Infer, script="infer", extra=True)
    requests = read_requests(cfg)
    model, chosen = load_model(cfg)
    for _, item in requests:
        check_speaker(item["speaker"], chosen)
    Sampling = models.BACKBONES[model.backbone].Sampling
    sampling = dataclasses.asdict(configs.build(Sampling, extra, "--"))
    if cfg.max_audio_length_ms:
        sampling["max_len"] = math.ceil(cfg.max_audio_length_ms / 1000 * model.frame_rate)
    if cfg.text and cfg.output == "-":
        for chunk in model.generate(**to_request(requests[0][1]), **sampling):
            sys.stdout.buffer.write((chunk.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes())
            sys.stdout.buffer.flush()
        return
    if "retries" not in extra:
        sampling["retries"] = 3  # nobody is waiting for the first chunk, so a runaway take is worth another try
    failed, started, seconds = 0, time.perf_counter(), 0.0
    for start in range(0, len(requests), cfg.batch_size):
        for out, wave, end in speak(model, requests[start : start + cfg.batch_size], sampling):
            if isinstance(wave, Invalid):
                failed += 1
                print(f"{out}: {wave}", file=sys.stderr)
                continue
            Path(out).parent.mkdir(parents=True, exist_ok=True)
            audio.write(out, wave, model.out_sample_rate)
            seconds += len(wave) / model.out_sample_rate
            if end == "cap":
                print(f"{out}: stopped at the length cap, the model had not ended by itself", file=sys.stderr)
            print(out)
        done, spent = min(start + cfg.batch_size, len(requests)), time.perf_counter() - started
        print(f"{done}/{len(requests)} | {seconds:.1f} s of audio in {spent:.1f} s | real-time factor {spent / max(seconds, 1e-9):.2f} | "
              f"ETA {spent / done * (len(requests) - done):.0f} s", file=sys.stderr)
    if failed:
        print(f"{failed} of {len(requests)} failed", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    configs.run(main)
