"""Golden tensors for VoxCPM 0.5B, 1.5 and 2 from the voxcpm package (2.0.3) on the tiny checkpoints of tests/tiny_voxcpm.py.

    pip install --no-deps voxcpm==2.0.3 && pip install -r tests/golden/requirements_voxcpm.txt
    python tests/golden/make_voxcpm.py

Writes voxcpm_<version>.safetensors, float32, and voxcpm_tokens.json. Arrays keep the layout of our contract: latents and noise
(patches, P, D), frames (T, D), all draws for the target patches only, rows then time.

    rows/<i>/text, latents, ref_latents   three utterances of unequal length; text ends with 101; a reference in V2 only
    draws/noise, time, keep               the package's own draws, recorded during its forward, at the target patches
    loss/diff, loss/stop                  means, as the package returns them
    loss/<variant>/diff, stop             the same rows and draws under other settings; metadata "variants" has the overrides
    grad                                  probes of d(diff + stop)/d(parameter), one row per main parameter, sorted by name
    adam/losses                           (5, 2) diff and stop before each of four AdamW steps and after them, same draws
    adam/moved                            probes of (parameter after - before)
    lora/loss/diff, stop, lora/grad       with the adapter of write_adapter; rows of grad sorted by adapter name
    codec/latents                         encode(wave(metadata "wave_samples"))
    codec/decode/latents, wave            every STRIDE-th sample of decode; V2 also wave_24000, decoded for that rate
    generate/<case>/noise, latents        generation with replayed noise; metadata "cases" has text, prompts and settings
    generate/<case>/prompt, reference     prompt latents in frames, where a case has them
    generate/<case>/wave                  every STRIDE-th sample of the package's waveform (a case with a prompt: prompt cut off)
    bf16/norm/in, weight, out             RMSNorm in bfloat16; bf16/time/t, embedding: the sinusoid of flow time in bfloat16

A probe is four numbers: norm and three projections (tiny_voxcpm.probe). Values before the quantiser's rounding keep MARGIN (in
units of a step; ADAM_MARGIN after optimizer steps) from a border, else other seeds are tried; stop logits differ by 0.01.
"""
import contextlib
import importlib.machinery
import importlib.util
import io
import json
import re
import sys
import tempfile
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

from tests import tiny_voxcpm as tiny  # noqa: E402

for lib in ("torchaudio", "librosa"):  # needed by the package for reading files only
    if importlib.util.find_spec(lib) is None:
        sys.modules[lib] = types.ModuleType(lib)
        sys.modules[lib].__spec__ = importlib.machinery.ModuleSpec(lib, None)

from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast  # noqa: E402
from voxcpm.model.utils import mask_multichar_chinese_tokens  # noqa: E402
from voxcpm.model.voxcpm import LoRAConfig, VoxCPMModel  # noqa: E402
from voxcpm.model.voxcpm2 import LoRAConfig as LoRAConfig2, VoxCPM2Model  # noqa: E402
from voxcpm.modules.locdit.local_dit import SinusoidalPosEmb  # noqa: E402
from voxcpm.modules.minicpm4.model import rms_layernorm  # noqa: E402

STRIDE = 29  # shares no factor with any codec stride, so every phase of every layer is seen
MARGIN = 1e-3
ADAM_MARGIN = 2e-4
FRAMES = 26  # more than the codec's reach (21 frames)

VARIANTS = {
    "0.5": {"mup": {"lm_config": {"use_mup": True}}},
    "1.5": {"long_rope": {"lm_config": {"max_position_embeddings": 65536}}},
    "2": {"rope_in_residual": {"residual_lm_no_rope": None}},
}

TEXTS = ["hello world", "the thing, the other thing.", "你好世界", "你好，世界人们。", "语音 hello你好 语音", "中国人 12 123", "日本語", "😀é—",
         "你好龍門", "hello\nworld", "a  b   c", "world ", "Ｆull　width", "", " hello", "  你好 ", "\tthe"]

CASES = {  # prompt and reference: how many patches of latents; a fixed length unless "stop" is set
    "zero_shot": {"text": "hello 你好 world", "length": 6},
    "zero_shot_other": {"text": "the thing", "length": 4, "cfg_value": 1.3, "inference_timesteps": 6},
    "many_steps": {"text": "hello", "length": 3, "inference_timesteps": 50},
    "continuation": {"text": "world", "prompt_text": "the hell", "prompt": 4, "length": 5},
    "continuation_short": {"text": " and world人们", "prompt_text": "世界", "prompt": 1, "length": 4},
    "cap": {"text": "a", "prompt_text": "hello 中国", "prompt": 2, "length": 99},
    "stop": {"text": "hello", "stop": True, "length": 30},
    "stop_early": {"text": "the world", "stop": True, "length": 30, "min_len": 0},
    "lora_zero_shot": {"text": "hello 你好 world", "length": 5, "lora": True},
    "lora_continuation": {"text": "world", "prompt_text": "the hell", "prompt": 3, "length": 4, "lora": True},
}
CASES_2 = {
    "reference": {"text": "hello world", "reference": 3, "length": 5},
    "reference_continuation": {"text": "world", "prompt_text": "the hell", "prompt": 3, "reference": 2, "length": 5},
    "lora_reference": {"text": "hello world", "reference": 3, "length": 4, "lora": True},
}


def load(folder, version, adapter=None):
    two = version == "2"
    settings = None
    if adapter:
        settings = (LoRAConfig2 if two else LoRAConfig)(**json.loads((adapter / "lora_config.json").read_text())["lora_config"])
    with contextlib.redirect_stderr(io.StringIO()):
        model = (VoxCPM2Model if two else VoxCPMModel).from_local(
            str(folder), optimize=False, training=True, device="cpu", lora_config=settings)
    if adapter:
        loaded, skipped = model.load_lora_weights(str(adapter))
        assert not skipped and set(loaded) == set(model.get_lora_state_dict())
    return model.train()


def main_parameters(model):
    return {k: p for k, p in sorted(model.named_parameters()) if not k.startswith("audio_vae.") and "lora_" not in k}


# ------------------------------------------------------------------------------------------------ watching the package


@contextlib.contextmanager
def recorded(seed):
    """Seed torch, and list every tensor that torch.rand, randn and randn_like hand out meanwhile."""
    drawn, originals = [], {name: getattr(torch, name) for name in ("rand", "randn", "randn_like")}

    def spy(original):
        def draw(*args, **kwargs):
            drawn.append(original(*args, **kwargs))
            return drawn[-1]
        return draw

    torch.manual_seed(seed)
    for name, original in originals.items():
        setattr(torch, name, spy(original))
    try:
        yield drawn
    finally:
        for name, original in originals.items():
            setattr(torch, name, original)


@contextlib.contextmanager
def replayed(noise):
    """torch.randn gives noise[0], noise[1], ... in the package's layout (1, D, P)."""
    original, rows = torch.randn, iter(noise)
    torch.randn = lambda size, **kwargs: next(rows).t()[None].clone().reshape(size)
    try:
        yield
    finally:
        torch.randn = original


@contextlib.contextmanager
def margins(model):
    """Lists, for each call of the quantiser, how far each value is from a rounding border: (..., latent)."""
    seen = []

    def hook(module, args, out):
        steps = torch.tanh(out.detach().double()) * model.fsq_layer.scale
        seen.append((steps - steps.floor() - 0.5).abs())

    handle = model.fsq_layer.in_proj.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


# ------------------------------------------------------------------------------------------------ losses


def packer(model):
    """The package's own packer on latents: its codec is replaced by a reshape."""
    spec = importlib.util.find_spec("voxcpm")
    path = Path(spec.submodule_search_locations[0]) / "training" / "packers.py"  # the package around it needs more libraries
    module_spec = importlib.util.spec_from_file_location("voxcpm_packers", path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    feat = model.feat_dim
    codec = types.SimpleNamespace(hop_length=feat, sample_rate=0, encode=lambda wav, rate: wav.view(1, -1, feat).transpose(1, 2))
    return module.AudioFeatureProcessingPacker(1, model.config.max_length, model.patch_size, feat, codec)


def rows(model, seed, version):
    g = torch.Generator().manual_seed(seed)
    P, D = model.patch_size, model.feat_dim
    out = []
    for i, (length, patches, reference) in enumerate(((7, 5, 0), (4, 8, 3), (10, 3, 0))):
        row = {"text": torch.cat([torch.randint(105, 420, (length,), generator=g), torch.tensor([101])]),
               "latents": 0.8 * torch.randn(patches, P, D, generator=g)}
        if version == "2" and reference:
            row["ref_latents"] = 0.8 * torch.randn(reference, P, D, generator=g)
        out.append(row)
    return out


def packed(model, examples):
    def pad(tensors):
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=-100)

    ones = torch.ones(len(examples), dtype=torch.long)
    references = None
    if any("ref_latents" in e for e in examples):
        references = pad([e["ref_latents"].flatten() if "ref_latents" in e else torch.zeros(0) for e in examples])
    batch = packer(model)(pad([e["latents"].flatten() for e in examples]), pad([e["text"][:-1] for e in examples]).int(),
                          ones, 0 * ones, [False] * len(examples), references)
    names = ("text_tokens", "text_mask", "audio_feats", "audio_mask", "loss_mask", "position_ids", "labels")
    return {k: batch[k] for k in names}


def losses(model, batch, seed):
    """The two losses, the draws at the target patches, and the smallest margin at an audio position."""
    with recorded(seed) as drawn, margins(model) as seen:
        out = model(**batch)
    keep, _, _, _, time, _, noise = drawn
    target = batch["loss_mask"].flatten().bool()
    draws = {"noise": noise[target].transpose(1, 2).contiguous(), "time": torch.sigmoid(time[target] - 0.4),
             "keep": keep[target] > 0.1}
    (steps,) = seen
    return out["loss/diff"], out["loss/stop"], draws, steps[batch["audio_mask"].bool()].min().item()


def probes(tensors):
    return torch.stack([tiny.probe(name, t) for name, t in sorted(tensors.items())])


def loss_goldens(version, folder, adapter, variants):
    """Tries seeds until every evaluation below keeps clear of the quantiser's borders."""
    for seed in range(2000):
        model = load(folder, version)
        examples = rows(model, seed, version)
        batch = packed(model, examples)
        diff, stop, draws, margin = losses(model, batch, seed)
        if margin < MARGIN or draws["keep"].all():
            continue
        out = {f"rows/{i}/{k}": v for i, e in enumerate(examples) for k, v in e.items()}
        out |= {f"draws/{k}": v for k, v in draws.items()}
        out |= {"loss/diff": diff.detach(), "loss/stop": stop.detach()}
        (diff + stop).backward()
        parameters = main_parameters(model)
        out["grad"] = probes({k: p.grad for k, p in parameters.items()})

        worst = margin
        for name, other in variants.items():
            *two, _, margin = losses(load(other, version), batch, seed)
            worst = min(worst, margin)
            out |= {f"loss/{name}/{k}": v.detach() for k, v in zip(("diff", "stop"), two)}
        tuned = load(folder, version, adapter)
        diff, stop, _, margin = losses(tuned, batch, seed)
        out |= {"lora/loss/diff": diff.detach(), "lora/loss/stop": stop.detach()}
        (diff + stop).backward()
        out["lora/grad"] = probes({k: p.grad for k, p in tuned.named_parameters() if "lora_" in k})
        if min(worst, margin) < MARGIN:
            continue

        before = {k: p.detach().clone() for k, p in parameters.items()}
        optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        series, worst = [], 1.0
        for step in range(5):
            diff, stop, _, margin = losses(model, batch, seed)
            worst = min(worst, margin)
            series.append(torch.stack([diff.detach(), stop.detach()]))
            if step < 4:
                optimizer.zero_grad()
                (diff + stop).backward()
                optimizer.step()
        if worst < ADAM_MARGIN:
            continue
        out["adam/losses"] = torch.stack(series)
        out["adam/moved"] = probes({k: p.detach() - before[k] for k, p in parameters.items()})
        print(f"  losses: seed {seed}, adam margin {worst:.1e}")
        return out
    raise RuntimeError("no seed keeps clear of the borders")


# ------------------------------------------------------------------------------------------------ codec


def codec_goldens(model, samples):
    codec = model.audio_vae.eval()
    latents = torch.randn(FRAMES, model.feat_dim, generator=torch.Generator().manual_seed(7))
    with torch.inference_mode():
        out = {"codec/latents": codec.encode(tiny.wave(samples)[None], codec.sample_rate)[0].t(), "codec/decode/latents": latents,
               "codec/decode/wave": codec.decode(latents.t()[None])[0, 0, ::STRIDE]}
        if hasattr(codec, "out_sample_rate"):
            out["codec/decode/wave_24000"] = codec.decode(latents.t()[None], torch.tensor([24000]))[0, 0, ::STRIDE]
    return out


# ------------------------------------------------------------------------------------------------ generation


def generate(model, case, noise, prompt, reference):
    """One call of the package with given noise. Returns latents, waveform, smallest quantiser margin, stop logits (n, 2)."""
    cache = {}
    if prompt is not None:
        cache |= {"prompt_text": case["prompt_text"], "audio_feat": prompt}
    if reference is not None:
        cache["ref_audio_feat"] = reference
    cache["mode"] = "ref_continuation" if len(cache) == 3 else "reference" if reference is not None else "continuation"
    logits = []
    handle = model.stop_head.register_forward_hook(lambda module, args, out: logits.append(out[0].clone()))
    length = case["length"]
    with replayed(noise), margins(model) as seen, contextlib.redirect_stderr(io.StringIO()):
        wave, _, latents = model.generate_with_prompt_cache(
            case["text"], cache if len(cache) > 1 else None, min_len=case.get("min_len", 2) if case.get("stop") else length,
            max_len=length, inference_timesteps=case.get("inference_timesteps", 10), cfg_value=case.get("cfg_value", 2.0))
    handle.remove()
    latents = latents[-len(logits):]  # V1 leaves the prompt's last patches in front
    prefill, *steps = seen
    audio = torch.zeros(prefill.shape[1], dtype=torch.bool)
    if reference is not None:
        audio[1 : 1 + len(reference)] = True
    if prompt is not None:
        audio[-len(prompt):] = True
    smallest = torch.cat([prefill[0][audio].flatten(), *(s.flatten() for s in steps)]).min().item()
    return latents, wave[0], smallest, torch.stack(logits)


def generation_goldens(version, plain, tuned):
    out, plain, tuned = {}, plain.eval(), tuned.eval()
    P, D = plain.patch_size, plain.feat_dim
    cases = CASES | (CASES_2 if version == "2" else {})
    for name, case in cases.items():
        for seed in range(500):
            g = torch.Generator().manual_seed(1000 + seed)
            noise = torch.randn(min(case["length"], 40), P, D, generator=g)
            prompt, reference = (0.8 * torch.randn(case[k], P, D, generator=g) if k in case else None for k in ("prompt", "reference"))
            latents, wave, margin, logits = generate(tuned if case.get("lora") else plain, case, noise, prompt, reference)
            gap = logits[:, 1] - logits[:, 0]
            if margin < MARGIN or gap.abs().min() < 0.01:
                continue
            n, least = len(latents), case.get("min_len", 2) + 2
            # a stopping case must want to stop before it may; in V1 it also goes on beyond the first patch that may be last
            if case.get("stop") and not (gap[: least - 1].max() > 0 and least + (version != "2") <= n <= 12):
                continue
            break
        else:
            raise RuntimeError(f"{name}: no seed fits")
        out |= {f"generate/{name}/noise": noise[:n], f"generate/{name}/latents": latents}
        if prompt is not None:
            out[f"generate/{name}/prompt"] = prompt.flatten(0, 1)
        if reference is not None:
            out[f"generate/{name}/reference"] = reference.flatten(0, 1)
        if not case.get("stop") and name not in ("many_steps", "cap"):
            out[f"generate/{name}/wave"] = wave[::STRIDE]
        print(f"  {name}: seed {seed}, {n} patches, margin {margin:.1e}, |latents| {latents.abs().mean():.2f}")
    return out, cases


def bf16_goldens(width):
    """Two places where the order of rounding shows in bfloat16."""
    g = torch.Generator().manual_seed(11)
    x, weight = (3 * torch.randn(*shape, generator=g, dtype=torch.float32).bfloat16() for shape in ((8, width), (width,)))
    t = torch.linspace(0, 1, 11).bfloat16()
    return {"bf16/norm/in": x, "bf16/norm/weight": weight, "bf16/norm/out": rms_layernorm(x, weight, 1e-5),
            "bf16/time/t": t, "bf16/time/embedding": SinusoidalPosEmb(width)(t)}


# ------------------------------------------------------------------------------------------------ tokens


def token_goldens(folder):
    """ids: the package with transformers 5, which rebuilds the pre-processing by itself. file_ids: the same wrapper around
    the rules that stand in tokenizer.json, as transformers 4 reads them; the two differ for text with a leading space.
    clean_ids, clean_file_ids: the same after the package's pipeline has tidied the text, which its trainer does not do."""
    wrapped = mask_multichar_chinese_tokens(LlamaTokenizerFast.from_pretrained(folder))
    by_file = mask_multichar_chinese_tokens(PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), unk_token="<unk>"))
    out = []
    for text in TEXTS:
        clean = re.sub(r"\s+", " ", text.replace("\n", " "))
        out.append({"text": text, "ids": wrapped(text), "file_ids": by_file(text), "clean_ids": wrapped(clean), "clean_file_ids": by_file(clean)})
    return out


def main():
    torch.set_num_threads(1)
    float32 = {"dtype": "float32", "device": "cpu"}  # the package reads its dtype from the config
    with tempfile.TemporaryDirectory() as scratch:
        for version in tiny.VERSIONS:
            print(version)
            base = Path(scratch) / version
            folder = tiny.write(base / "plain", version, **float32)
            adapter = tiny.write_adapter(base / "adapter", version)
            variants = {k: tiny.write(base / k, version, **float32, **v) for k, v in VARIANTS[version].items()}
            plain, tuned = load(folder, version), load(folder, version, adapter)
            names = {k: tuple(v.shape) for k, v in plain.state_dict().items()}
            codec = {f"audio_vae.{k}": v for k, v in tiny.codec_shapes(tiny.config(version)).items()}
            assert names == {**tiny.main_shapes(tiny.config(version)), **codec}
            samples = FRAMES * int(plain.audio_vae.hop_length) - 217
            tensors, cases = generation_goldens(version, plain, tuned)
            tensors |= codec_goldens(plain, samples)
            tensors |= bf16_goldens(32)
            tensors |= loss_goldens(version, folder, adapter, variants)
            metadata = {"cases": json.dumps(cases, ensure_ascii=False), "variants": json.dumps(VARIANTS[version]),
                        "wave_samples": str(samples), "stride": str(STRIDE), "package": "voxcpm 2.0.3"}
            tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
            path = HERE / f"voxcpm_{version}.safetensors"
            save_file(tensors, path, metadata)
            print(f"  {path.name}: {len(tensors)} tensors, {path.stat().st_size / 1000:.0f} kB")
        tokens = token_goldens(folder)
        lines = ",\n".join(json.dumps(t, ensure_ascii=False) for t in tokens)
        (HERE / "voxcpm_tokens.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


if __name__ == "__main__":
    main()
