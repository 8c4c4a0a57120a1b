"""IndexTTS2's GPT, text front end and chain by their own code: python tests/golden/make_indextts2.py INDEX_TTS_FOLDER

INDEX_TTS_FOLDER is a checkout of index-tts/index-tts at ee40fa7. Weights, vocabulary and config are those of
tests/tiny_indextts2.py; upstream's numbers that are written into its code (1024 features, 1024 wide emotion, 1280 states)
are replaced by the tiny ones. Stored are inputs and outputs. Writes indextts2.safetensors and indextts2.json.

With a second word, `merged`, it writes nothing: an adapter on GPT, heads and encoders is merged here, and upstream's class
loads the gpt.pth and must find the same states at the codes.
"""
import importlib.abc
import importlib.machinery
import json
import sys
import tempfile
import types
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
import yaml
from munch import munchify
from omegaconf import OmegaConf
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [sys.argv[1], str(HERE.parent.parent)]


class Anything(types.ModuleType):
    """A package that is imported and never called in what runs here."""

    __path__ = []

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **named: None})


class Unneeded(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    packages = ("torchaudio", "modelscope", "whisper", "tiktoken", "matplotlib", "indextts.s2mel.dac")

    def find_spec(self, name, path=None, target=None):
        known = any(name == p or name.startswith(p + ".") for p in self.packages)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if known else None

    def create_module(self, spec):
        return Anything(spec.name)

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Unneeded())
from indextts import infer_v2  # noqa: E402
from indextts.codec.maskgct_codec import build_semantic_codec  # noqa: E402
from indextts.gpt import model_v2  # noqa: E402
from indextts.s2mel.modules import commons  # noqa: E402
from indextts.s2mel.modules.bigvgan import bigvgan  # noqa: E402
from indextts.utils.front import TextNormalizer, TextTokenizer  # noqa: E402

from tests import tiny  # noqa: E402
from tests import tiny_indextts2 as T  # noqa: E402

TEXTS = json.loads((HERE / "indextts2_texts.json").read_text(encoding="utf-8"))
ROWS = [(17, 23), (9, 41)]  # pieces, codes
CLIPS = (37, 30)  # frames of the prompts; upstream tells its encoders the number of channels as the length, so not above 40
STEPS = 4  # of the solver


class Same:
    """A normaliser that leaves the text as it is."""

    def normalize(self, text):
        return text


def small(cls, **fixed):
    """A class of upstream with some arguments replaced."""
    return lambda *args, **given: cls(*args, **{**given, **fixed})


def gpt():
    c = T.config()
    conformer, resampler = model_v2.ConformerEncoder, model_v2.PerceiverResampler
    model_v2.ConformerEncoder = small(conformer, input_size=T.FEATURES)
    model_v2.PerceiverResampler = lambda dim, **given: resampler(T.EMOTION if dim == 1024 else dim, **given)
    model = model_v2.UnifiedVoice(**c["gpt"])
    model.emovec_layer = torch.nn.Linear(T.EMOTION, T.WIDTH)
    missing, unexpected = model.load_state_dict(T.gpt_weights(c), strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model.eval()


def clip(frames, seed):
    return torch.randn(1, frames, T.FEATURES, generator=torch.Generator().manual_seed(seed))


def latents(model, features):
    return model.get_conditioning(features.transpose(1, 2), torch.tensor([features.shape[1]]))


def training(model, out):
    """Losses, logits, gradients and latents, each row by itself: alone nothing attends to padding."""
    dtype = model.mel_head.weight.dtype
    g = torch.Generator().manual_seed(1)
    sums = {"text": 0.0, "mel": 0.0}
    counts = {"text": sum(a + 1 for a, _ in ROWS), "mel": sum(b + 1 for _, b in ROWS)}
    for i, (n_text, n_mel) in enumerate(ROWS):
        text = torch.randint(2, model.number_text_tokens, (1, n_text), generator=g)
        codes = torch.randint(0, T.CODES, (1, n_mel), generator=g)
        features, emotion = clip(CLIPS[i], 10 + i).to(dtype), clip(CLIPS[1 - i], 20 + i).to(dtype)
        spk = latents(model, features)
        emovec = model.get_emovec(emotion, torch.tensor([emotion.shape[1]]))
        speed = model.speed_emb(torch.tensor([[1, 0]]))
        conds = torch.cat([spk + emovec[:, None], speed], 1)
        text_in, text_out = model.build_aligned_inputs_and_targets(F.pad(text, (0, 1), value=1), 0, 1)
        mel_in, mel_out = model.build_aligned_inputs_and_targets(F.pad(codes, (0, 1), value=T.CODES + 1), T.CODES, T.CODES + 1)
        text_emb = model.text_embedding(text_in) + model.text_pos_embedding(text_in)
        mel_emb = model.mel_embedding(mel_in) + model.mel_pos_embedding(mel_in)
        text_logits, mel_logits = model.get_logits(conds, text_emb, model.text_head, mel_emb, model.mel_head)
        sums["text"] = sums["text"] + F.cross_entropy(text_logits[..., : n_text + 1], text_out[:, : n_text + 1], reduction="sum")
        sums["mel"] = sums["mel"] + F.cross_entropy(mel_logits[..., : n_mel + 1], mel_out[:, : n_mel + 1], reduction="sum")
        with torch.no_grad():
            latent = model(spk, text.clone(), torch.tensor([n_text]), codes.clone(), torch.tensor([n_mel]), emotion, emo_vec=emovec,
                           use_speed=torch.zeros(1, dtype=torch.long))
        out |= {f"text.{i}": text[0], f"codes.{i}": codes[0], f"features.{i}": features[0], f"emotion.{i}": emotion[0], f"spk.{i}": spk[0],
                f"emovec.{i}": emovec[0], f"mel_logits.{i}": mel_logits[0, :, -6:].T, f"latent.{i}": latent[0]}
    loss = 0.2 * sums["text"] / counts["text"] + 0.8 * sums["mel"] / counts["mel"]
    loss.backward()
    out["losses"] = torch.stack([sums["text"], sums["mel"]])
    named = sorted((n, p) for n, p in model.named_parameters() if p.grad is not None)
    probes = tiny.fill({f"probe.{n}": tuple(p.shape) for n, p in named})
    products = [[float((p.grad * probes[f"probe.{n}"]).sum()), float(p.grad.norm())] for n, p in named]
    out["gradients"] = torch.tensor(products, dtype=torch.float64)
    model.zero_grad()
    return [n for n, _ in named]


@torch.no_grad()
def generation(model, out):
    model.post_init_gpt2_config(kv_cache=True)
    features = clip(CLIPS[0], 10)
    emovec = model.merge_emovec(features, clip(CLIPS[1], 20), torch.tensor([37]), torch.tensor([30]), alpha=0.6)
    out["merged_emovec"] = emovec[0]
    kinds = {"greedy": dict(num_beams=1, repetition_penalty=1.0), "penalty": dict(num_beams=1, repetition_penalty=10.0),
             "beams": dict(num_beams=3, repetition_penalty=1.0), "beams_penalty": dict(num_beams=3, repetition_penalty=10.0),
             "beams_length": dict(num_beams=4, repetition_penalty=2.0, length_penalty=1.0)}
    for i in range(2):
        for kind, how in kinds.items():
            codes, _ = model.inference_speech(features, out[f"text.{i}"][None], emo_vec=emovec, cond_lengths=torch.tensor([CLIPS[0]]),
                                              do_sample=False, max_generate_length=24, **{"length_penalty": 0.0, **how})
            out[f"{kind}.{i}"] = codes[0]
    transformers.set_seed(0)


def front_end():
    """[text, what SentencePiece gets, pieces, {most: segments}] of each text."""
    normalizer = TextNormalizer(enable_glossary=True)
    normalizer.zh_normalizer = normalizer.en_normalizer = Same()
    normalizer.load = lambda: None
    with tempfile.NamedTemporaryFile(suffix=".model") as f:
        f.write(T.bpe_model())
        f.flush()
        tokenizer = TextTokenizer(f.name, normalizer)
    rows = []
    for text in TEXTS:
        pieces = tokenizer.tokenize(text)
        segments = {most: tokenizer.split_segments(pieces, most) for most in (12, 30, 120)}
        rows.append({"text": text, "ids": tokenizer.encode(text), "pieces": pieces, "segments": segments})
    return rows, tokenizer


def chain(model, tokenizer, out):
    """Upstream's own infer on a prompt whose features are given, with the solver's noise replayed."""
    c = T.config()
    tts = infer_v2.IndexTTS2.__new__(infer_v2.IndexTTS2)
    tts.cfg, tts.device, tts.dtype, tts.gpt, tts.tokenizer, tts.stop_mel_token = OmegaConf.create(c), "cpu", None, model, tokenizer, T.CODES + 1
    tts.gr_progress = None
    codec = build_semantic_codec(munchify(c["semantic_codec"]))
    values = tiny.fill({n: tuple(t.shape) for n, t in codec.state_dict().items()})
    codec.load_state_dict({n: w - 1 if n.endswith("bias") else w for n, w in values.items()})
    tts.semantic_codec = codec.eval()
    s2mel = commons.MyModel(munchify(c["s2mel"]), use_gpt_latent=True)
    parts = T.s2mel_parts()
    sizes = [parts["gpt_layer"][f"{i}.weight"].shape for i in range(3)]
    s2mel.models["gpt_layer"] = torch.nn.Sequential(*[torch.nn.Linear(b, a) for a, b in sizes])
    s2mel.models["cfm"].estimator.setup_caches(max_batch_size=1, max_seq_length=8192)
    for part, module in s2mel.models.items():
        missing, unexpected = module.load_state_dict(parts[part], strict=False)
        assert not unexpected and not [n for n in missing if "freqs_cis" not in n and "causal_mask" not in n], (part, missing, unexpected)
    tts.s2mel = s2mel.eval()
    vocoder = bigvgan.BigVGAN(munchify(T.VOCODER), use_cuda_kernel=False)
    vocoder.load_state_dict(T.bigvgan_weights())
    vocoder.remove_weight_norm()
    tts.bigvgan = vocoder.eval()
    voices, emotions = T.tables()
    tts.emo_num = T.EMOTIONS
    tts.spk_matrix, tts.emo_matrix = torch.split(voices, T.EMOTIONS), torch.split(emotions, T.EMOTIONS)

    frames = 30
    features, style = clip(CLIPS[0], 10), torch.randn(1, T.STYLE, generator=torch.Generator().manual_seed(30))
    mel = torch.randn(1, T.MELS, frames, generator=torch.Generator().manual_seed(31)) - 3
    with torch.no_grad():
        _, vectors = codec.quantize(features)
        condition = s2mel.models["length_regulator"](vectors, ylens=torch.LongTensor([frames]), n_quantizers=3, f0=None)[0]
    tts.cache_spk_cond, tts.cache_s2mel_style, tts.cache_s2mel_prompt, tts.cache_spk_audio_prompt, tts.cache_mel = features, style, condition, "voice", mel
    out |= {"style": style[0], "condition": condition, "ref_mel": mel}
    randn = torch.randn
    draw = torch.Generator().manual_seed(32)
    noises = []

    def noise(*shape, **kw):
        if list(shape[0]) == [1, T.MELS, shape[0][-1]] if isinstance(shape[0], (list, tuple)) else False:
            noises.append(randn(*shape, generator=draw))
            return noises[-1]
        return randn(*shape, **kw)

    inference = s2mel.models["cfm"].inference
    s2mel.models["cfm"].inference = lambda *a, **k: inference(*a[:5], STEPS, **k)
    runs = {"plain": dict(), "audio": dict(emo_audio_prompt="other", emo_alpha=0.6),
            "vector": dict(emo_vector=[0.3, 0, 0.2, 0, 0.1, 0, 0, 0.05], emo_alpha=0.7)}
    for name, how in runs.items():
        emo = clip(CLIPS[1], 20) if name == "audio" else features + 0.01 * clip(CLIPS[0], 40)
        tts.cache_emo_cond, tts.cache_emo_audio_prompt = emo, how.get("emo_audio_prompt", "voice")
        if name != "audio":
            out["emotion_of_prompt"] = emo[0]
        noises.clear()
        torch.randn = noise
        rate, wave = tts.infer("voice", "Hello there. How are you? It's me, again.", None, max_text_tokens_per_segment=16, num_beams=1, top_k=1,
                               max_mel_tokens=9, **how)
        torch.randn = randn
        assert rate == 22050 and noises
        out[f"wave.{name}"] = torch.from_numpy(wave[:, 0].copy())
        for k, n in enumerate(noises):
            out[f"noise.{name}.{k}"] = n[0].half().float() if False else n[0]
    return {name: how for name, how in runs.items()}


TARGETS = ["c_attn", "c_proj", "c_fc", "text_head", "mel_head", "linear_q", "w_1", "pointwise_conv1", "to_kv", "proj_context", "emo_layer"]


def merged():
    """The largest difference between our states with an adapter on and upstream's from the merged file."""
    import lora
    import models

    with tempfile.TemporaryDirectory() as name:
        base, c = Path(name) / "base", T.config()
        base.mkdir()
        (base / "config.yaml").write_text(yaml.safe_dump(c))
        (base / "bpe.model").write_bytes(T.bpe_model())
        torch.save(T.gpt_weights(c), base / "gpt.pth")
        ours, theirs, out, plain = models.load(base), gpt(), {}, {}
        training(theirs, plain)
        lora.apply_lora_to_model(ours, {"r": 4, "alpha": 8.0, "target_modules": TARGETS})
        for module in lora.lora_modules(ours).values():
            torch.nn.init.normal_(module.lora_B, std=0.1)
        missing, unexpected = theirs.load_state_dict(torch.load(ours.save(Path(name) / "merged", merged=True) / "gpt.pth", weights_only=True))
        assert not missing and not unexpected
    training(theirs, out)
    worst, moved = 0.0, 0.0
    for i in range(len(ROWS)):
        clips = {"features": out[f"features.{i}"], "emo_features": out[f"emotion.{i}"]}
        heard = ours.conditioned(clips)
        conds = torch.cat([heard["spk"] + heard["emovec"], ours.speed_emb.weight.detach().flip(0)])
        states = ours._latents({"conds": conds}, out[f"text.{i}"].tolist(), out[f"codes.{i}"])
        worst = max(worst, float((states - out[f"latent.{i}"]).abs().max()))
        moved = max(moved, float((plain[f"latent.{i}"] - out[f"latent.{i}"]).abs().max()))
    print(f"merged: states differ by {worst:.1e}; the adapter changes them by {moved:.1e}")


def main():
    torch.manual_seed(0)
    if sys.argv[2:] == ["merged"]:
        return merged()
    model, out = gpt(), {}
    training(model, out)
    exact = {}
    names = training(model.double(), exact)  # float32 would leave a gradient off by a thousandth of its norm
    out["gradients"] = exact["gradients"]
    model.float()
    generation(model, out)
    rows, tokenizer = front_end()
    chain(model, tokenizer, out)
    keep = {n: t.detach().contiguous() for n, t in out.items()}
    save_file({n: t.float() if t.is_floating_point() and n != "gradients" else t for n, t in keep.items()}, HERE / "indextts2.safetensors", {"gradients": json.dumps(names)})
    text = json.dumps(rows, ensure_ascii=False, indent=0)
    (HERE / "indextts2.json").write_text(text + "\n", encoding="utf-8")
    for name, t in keep.items():
        print(name, tuple(t.shape), float(t.float().std()) if t.numel() > 1 else t)


main()
