"""Find the file of models/ that knows a checkpoint, and load it.

    model = models.load("checkpoints/some-folder", device="cuda", dtype=torch.bfloat16)

A backbone is one file here; there is no list to edit. What follows is the contract: every name that the
scripts, lora.py and models/parts use on such a file or on its model. tests/test_backbones.py reads it
here and holds every backbone against it. Audio is (n,) float32 mono in [-1, 1]; a row is one of a manifest.

The file:
  recognizes(config)          is a checkpoint of this config.json (or {"tensors": names}) one of ours? Several
                              keys tell, never a folder's name; exactly one file of models/ may say yes
  load(folder, device, dtype, options, extra, weights, allow_unused)
                              the model of a published folder or file, in eval mode. options: Training's;
                              extra: {part: path} of parts kept elsewhere, of which `find_parts` finds those
                              in PARTS, {part: hub id or models.parts.Part}, of the file; weights: which
                              file or naming where several lie side by side, or "scratch" for drawn ones;
                              dtype None: the file's
  blank(size, version, device, dtype, options)
                              a model with drawn weights for bench.py; size: "tiny", "mid" or "real"; version:
                              one of VERSIONS, if the file has several
  Config                      dataclass of the checkpoint's values, under their published names
  Training                    dataclass: the section `backbone:` of a training config
  Sampling                    dataclass: what `generate` takes besides a request; also infer.py's flags
  LAMBDAS                     {"loss/x": default weight}
  TINY                        a Config that runs in a second

The model, values:
  config                      the Config
  backbone                    name of the file in models/
  sample_rate                 of the audio that `encode` reads
  out_sample_rate             of the audio that `generate` returns
  frame_rate                  steps of `frames` per second of audio
  device                      where the weights are
  dtype                       of the weights
  codec                       the frozen codec, float32, in no list of parameters: encode(wave),
                              decode(frames), stream() -> object with decode(chunk), an nn.Module's own
  tokenizer                   of texts; its `vocab` is {piece: id}
  codec_key                   text that names the codec and how it is used: another key, other cached codes
  encode_key                  text that names all else that `encode` reads: another key, other cached examples
  files                       {role: path} of what `save` copies, "tokenizer" among them; {} of a blank model
  embeddings                  names of the modules that lora.train_embeddings trains
  speaker_input               does `speaker` reach the model?
  namings                     names of the published layouts, the preferred one first
  native_adapter              format of adapters that this model's own tools read, a key of adapter_namings
  adapter_namings             {format of adapters that can be written: naming of its tensors}
  lora_dropout_after          is dropout on the adapter's update (True) or on its input?

The model, calls in the order in which data meets them:
  equip(codec, tokenizer, files, options)
                              by load and blank, once the weights are there: all that does not come with them,
                              and what is computed from it. options: Training's values
  encode_text(text, speaker)  ids of a text, exactly what training feeds
  encode_audio(source, start, end)
                              CPU tensor that the codec makes of a path or of (n,) samples
  encode(row)                 {name: CPU tensor} of a row, no batch dim; slow, frozen, deterministic
  blank_example(seconds, tokens)
                              an example of a clip of that length with so many text ids, without content
  length(example)             positions of the trained network, as upstream counts them; 0: nothing to train
  collate(examples, seeds)    (batch, counts); every draw of training is made here, from each row's own seed;
                              seeds None: fixed by the rows' content and nothing dropped, for validation
  counts(batch)               {name: what the sum of that name in `forward` is divided by}
  forward(batch)              {"loss/x": 0-dim float32 sum, "metric/y": detached sum}; no draw but dropout
  set_recompute(every)        activation checkpointing of every n-th layer; 0 of none, True of all
  blocks()                    the modules that torch.compile takes one by one
  lora_targets(settings)      names of the Linears that the words of a lora section mean; none: a default
  sample_request(row)         {argument of generate: value} for a validation sample, besides text and seed
  generate(text, prompts, speaker, seed, noise)
                              chunks (n,) of audio; joined they are the whole. prompts: (text, audio, speaker)
                              each; further keywords are Sampling's
  generate_batch(requests)    (i, chunk) of requests [{"text": ..}, ..], one forward per step for all of them;
                              each may name a resident adapter, {"lora": name} (parts/slots.py)
  frames(text, prompts, speaker, seed, noise)
                              what `generate` decodes, step by step; `finish` is then ["end"] or ["cap"]
  _run(requests, s)           (i, frame) of requests that are checked, for parts/sampling.py
  published_name(parameter, naming)
                              its name in a published file
  published_rows(parameter, naming)
                              row order of the published weight (published = ours[rows]); None: it is ours
  published_state_dict(naming, merged)
                              {published name: tensor}; merged adds the adapters, in float32
  adapter_words(modules, values)
                              what the native adapter's settings file says of the wrapped modules
  save(folder, naming, merged)
                              write a published folder; returns its path

The model, set from outside after `equip`; each has a value from the start:
  path                        by load: where the checkpoint was found; ""
  fingerprint                 by load: names the weights; ""
  left_unused                 by load: names of tensors of the file that were not used; []
  speakers                    by train.py, infer.py and merge_lora.py: {name: number}; the folder's, or {}
  max_length                  by train.py, lower: positions of a row at most; the checkpoint's
  finish                      by _run and parts/sampling.py: how each request ended, "end" or "cap"; []
  training                    by train() and eval()

The model, only where there is something to say, and what counts without it:
  encode_audio_batch(waves)   encode_audio of several (n,) clips in one pass of the codec; without: one by one
  published_copies(parameter, naming)
                              further published names of the same tensor; without: ()
  published_axes(parameter)   "turned": a published weight is [in, out], "kernel": it is (out, in, 1); without
                              and else: "", as a Linear holds it
  adapter_key(name)           a key of a foreign adapter under its module's name here; without: itself
  harmless_adapter_keys       regexes over names in foreign adapters that never did anything; without: ()
  refused_adapter_keys        {regex over such names: why they cannot be used}; without: {}
  idle_in_losses              beginnings of names of parameters that no loss depends on (tests); without: ()
  lora_state                  by lora.py: what it wrapped; without: no adapter
"""
import importlib
import os
import pkgutil
from pathlib import Path

import torch

from models.parts import Invalid, Part, checkpoint, quant
from models.parts.plain import read_object, read_yaml, shown

FILES = [file.name for file in pkgutil.iter_modules(__path__) if not file.ispkg]
BACKBONES = {name: importlib.import_module(f"models.{name}") for name in FILES}
CONFIGS = ("config.json", "config.yaml")
ADAPTER_CONFIGS = ("lora_config.json", "adapter_config.json")
WEIGHTS = (".safetensors", ".pt", ".pth", ".bin")
SHELF = "checkpoints"  # where the README and the files in configs/ have them
WHOLE = 16  # bits of weights that are left as they are, whatever their dtype
EXTRA = {"codec", "tokenizer", "w2v_bert", "semantic_codec", "campplus", "bigvgan"}  # may lie elsewhere


def backbones():
    """{name: module} of every backbone."""
    return dict(BACKBONES)


def folder_of(path):
    """The local folder (or single file) of a checkpoint, by path or by org/name of one in the hub cache.

    Nothing is ever downloaded.
    """
    place = checkpoint.follow(Path(path).expanduser())
    if place.exists():
        return place
    parts = str(path).split("/")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", ".."):
        raise Invalid(f"no checkpoint at {path}; "
                      "expected the folder of one, or org/name of one in the local hub cache")
    cache = hub_cache() / folder_in_cache(path)
    for snapshot in snapshots(hub_cache(), path):
        return snapshot
    # A path of the user's own looks like org/name, too; as a hub id it would lead nowhere.
    if parts[0] == SHELF or Path(parts[0]).is_dir():
        raise Invalid(f"no checkpoint at {path} (seen from {Path.cwd()}). Nothing is downloaded; "
                      "README.md has the hub id of each and the command that fetches it")
    raise Invalid(f"no folder {path} here ({Path.cwd()}) and no copy of it in the hub cache at {cache}. "
                  "Nothing is downloaded; if it is the id of a hub repository, run\n"
                  f"    hf download {path} --local-dir {SHELF}/{parts[1]}\n"
                  f"and give {SHELF}/{parts[1]}")


def folder_in_cache(hub_id):
    return f"models--{hub_id.replace('/', '--')}"


def snapshots(cache, hub_id):
    """The copies of a repository in a hub cache, the one that refs/main names first, then the newest."""
    place = cache / folder_in_cache(hub_id)
    found = sorted((place / "snapshots").glob("*"), key=lambda p: p.stat().st_mtime, reverse=True)
    main = place / "refs" / "main"
    name = main.read_text().strip() if main.is_file() else ""
    return sorted(found, key=lambda p: p.name != name)


def hub_cache():
    """Where the hub's own tool keeps what it fetched: its variables, also the old one, in its order."""
    variables = os.environ
    place = variables.get("HF_HUB_CACHE") or variables.get("HUGGINGFACE_HUB_CACHE")
    if place:
        return Path(place).expanduser()
    caches = variables.get("XDG_CACHE_HOME") or "~/.cache"
    home = variables.get("HF_HOME") or os.path.join(caches, "huggingface")
    return Path(home).expanduser() / "hub"


def find_parts(module, folder, given):
    """{part: place} of what a backbone keeps apart from its weights: as given, else where it is found.

    module.PARTS says what is looked for: under its names in the checkpoint's folder and the hf_cache in it,
    then beside it, then in a hub cache, the folder's own or the user's. What is nowhere is left to the
    backbone, which says so.
    """
    parts = getattr(module, "PARTS", dict.fromkeys(EXTRA, ""))
    parts = {key: part if isinstance(part, Part) else Part(part) for key, part in parts.items()}
    places = {key: published_place(folder, part) for key, part in parts.items() if part.repository}
    found = {key: place for key, place in places.items() if place}
    for key, place in given.items():
        if key not in parts:
            raise Invalid(f"extra.{key}: this backbone keeps no such part apart; it has {', '.join(parts)}")
        try:
            found[key] = file_in(folder_of(place), parts[key])
        except Invalid as e:
            raise Invalid(f"extra.{key}: {e}") from None
    return found


def file_in(place, part):
    """The file of a part in a folder that is laid out as its repository; else the place itself."""
    file = place / part.file
    return file if part.file and file.exists() else place


def published_place(folder, part):
    """Where a published part lies, seen from a checkpoint; None if it is nowhere."""
    home = folder if folder.is_dir() else folder.parent
    own_cache = home / "hf_cache"
    names = part.names or (part.repository.split("/")[1],)
    near = [place / name for place in (own_cache, home, home.resolve().parent) for name in names]
    for cache in (own_cache, hub_cache()):
        near += [snapshot / part.file for snapshot in snapshots(cache, part.repository)]
    return next((place for place in near if place.exists()), None)


def parts_elsewhere(path, given):
    """{part: absolute path} of all that `load` takes from outside of the checkpoint, for a record."""
    folder = folder_of(path)
    found = find_parts(find(path), folder, given)
    inside = folder.resolve()
    # A file of the hub cache is a link whose target has lost its name, so the place itself is recorded.
    places = {key: place.absolute() for key, place in found.items()}
    return {key: str(place) for key, place in places.items() if not place.resolve().is_relative_to(inside)}


def present(parts):
    """Those of recorded parts that are still in their places; `load` searches for the others again."""
    return {key: place for key, place in parts.items() if Path(place).exists()}


def read_config(path):
    """The dictionary in config.json or config.yaml; without one, {"tensors": names}, for names can tell."""
    folder = path if path.is_dir() else path.parent
    for file in (folder / name for name in CONFIGS):
        if not file.is_file():
            continue
        return read_object(file) if file.suffix == ".json" else read_yaml(file)
    files = [path]
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in WEIGHTS]
    if not files:
        raise Invalid(f"{path} holds no config.json, no config.yaml and no weights; is it the right folder?")
    names = set()
    for file in files:
        names.update(checkpoint.read(file))
    return {"tensors": sorted(names)}


def find(path):
    """The module of models/ whose checkpoints look like this one."""
    folder = folder_of(path)
    if folder.is_file() and not folder.name.endswith((*WEIGHTS, ".index.json")):
        raise Invalid(f"{path} is no file of weights; give the folder of the checkpoint, "
                      f"here {folder.parent}")
    if not any((folder / name).is_file() for name in CONFIGS):
        if any((folder / name).is_file() for name in ADAPTER_CONFIGS):
            raise Invalid(f"{path} is an adapter; give its base as the checkpoint and this folder as --lora")
    config = read_config(folder)
    found = [module for module in BACKBONES.values() if module.recognizes(config)]
    if len(found) == 1:
        return found[0]
    fault = "no backbone recognizes it"
    if found:
        fault = f"{' and '.join(module.__name__ for module in found)} all recognize it"
    if "tensors" in config:
        fault += " (without config.json or config.yaml, only names of tensors can tell)"
    keys = ", ".join(map(str, config.get("tensors", config)))
    raise Invalid(f"{path}: {fault}. Known backbones: {', '.join(BACKBONES)}. Keys seen: {shown(keys, 300)}")


def pick_device(name="auto", local_rank=0):
    """torch.device of a name; auto is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps", "xpu"):
        raise Invalid(f"device {name!r} is not known; use auto, cpu, cuda, cuda:1 or mps")
    if (device.index or 0) >= count_devices(device.type):
        raise Invalid(f"device {name} is not there on this machine; use auto or cpu")
    return torch.device("cuda", local_rank) if name == "cuda" else device


def count_devices(kind):
    """How many devices of a type this machine has."""
    if kind == "cpu":
        return 1
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    return getattr(torch, kind).device_count()


def pick_dtype(name, device):
    """torch.dtype of a name; auto is bfloat16 on CUDA and float32 elsewhere."""
    dtypes = {
        "auto": torch.bfloat16 if device.type == "cuda" else torch.float32,
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
    }
    if name not in dtypes:
        raise Invalid(f"dtype {name!r} is not known; use auto, float32 or bfloat16")
    return dtypes[name]


def load(path, device="cpu", dtype=torch.float32, options=None, extra=None, weights=None, allow_unused=False,
         bits=WHOLE):
    """The model of a published folder, in eval mode; the arguments are those of a backbone's own load.

    bits: 8 or 4 rounds the weights of its layers, for frozen bases under an adapter (parts/quant.py). They
    are loaded and rounded on the CPU, so that the device never holds more than the codes.
    """
    unknown = set(extra or ()) - EXTRA
    if unknown:
        raise Invalid(f"extra: {', '.join(sorted(unknown))} unknown; known are {', '.join(sorted(EXTRA))}")
    module = find(path)
    folder = folder_of(path)
    if isinstance(device, str):
        device = pick_device(device)
    extra = find_parts(module, folder, extra or {})
    first = device if bits == WHOLE else torch.device("cpu")
    model = module.load(folder, first, dtype, options or {}, extra, weights, allow_unused)
    model.path = str(path)
    model.fingerprint = checkpoint.fingerprint(model)
    if bits != WHOLE:
        quant.quantise(model, bits)
        model.to(device)
    return model
