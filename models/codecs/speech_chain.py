"""The frozen models around IndexTTS2's language model, as one codec: recordings to codes, codes and states
to sound.

    22 kHz ─16 kHz─▶ w2v-BERT, normalised ─▶ features (T, 1024) at 50 Hz ─RepCodec─▶ codes (T,)
    prompt: features ─RepCodec─▶ vectors ─regulator─▶ condition; its mel; CAM++ ─▶ style
    codes ─▶ vectors, + the language model's states ─S2Mel behind the prompt─▶ mel ─BigVGAN─▶ 22 kHz

Each part is read when it is first needed: who trains from cached codes needs none of them. Always float32.
"""
import contextlib
import hashlib
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from models.codecs import bigvgan, campplus, repcodec, s2mel, w2vbert
from models.parts import Invalid, Part, audio, checkpoint

RATE = 16000  # of what w2v-BERT and CAM++ hear
LAYERS = 17  # hidden state of w2v-BERT that the features are
CODES_PER_SECOND = 50
PROMPT_SECONDS = 15  # the published code cuts longer prompts here, and its encoders saw none that are longer
SHORTEST = 0.1  # seconds of a prompt: below, no frame of the encoders is left
SILENCE = 1e-4  # a recording whose loudest sample is below (-80 dB) holds no voice
# mel frames in the first chunk of sound, which should come at once, and in the others
REFERENCES = 16  # prompts that are kept: the voices of one session, some megabytes each
FIRST_FRAMES, FRAMES = 8, 256


PARTS = {
    "w2v_bert": Part(
        repository="facebook/w2v-bert-2.0", names=("w2v-bert-2.0",),
        purpose="to turn recordings into features and codes"),
    "semantic_codec": Part(
        names=("semantic_codec_model.safetensors", "MaskGCT/semantic_codec/model.safetensors"),
        repository="amphion/MaskGCT", file="semantic_codec/model.safetensors",
        purpose="to turn features into codes and codes into vectors"),
    "campplus": Part(
        names=("campplus_cn_common.bin",), repository="funasr/campplus", file="campplus_cn_common.bin",
        purpose="to take the voice from a prompt"),
    "bigvgan": Part(
        repository="nvidia/bigvgan_v2_22khz_80band_256x", names=("bigvgan", "bigvgan_v2_22khz_80band_256x"),
        purpose="to make sound of a mel"),
}


def spots(path, count=16, size=4096):
    """A checksum of a file's size and of some places in it, which reads 64 kB of a file of gigabytes."""
    if path.is_dir():
        files = [p for p in sorted(path.iterdir()) if p.suffix in (".safetensors", ".bin", ".pt")]
        return zlib.crc32(repr([(p.name, spots(p)) for p in files]).encode())
    length = path.stat().st_size
    crc = zlib.crc32(str(length).encode())
    with open(path, "rb") as f:
        for i in range(count):
            f.seek(max(0, length - size) * i // (count - 1))
            crc = zlib.crc32(f.read(size), crc)
    return crc


@dataclass
class Places:
    """Where everything lies."""

    folder: Path
    config: dict  # config.yaml
    extra: dict  # {part: place} of those that were found

    def file(self, key, default):
        """A file that belongs to the checkpoint itself, by its name in config.yaml."""
        path = self.folder / str(self.config.get(key, default))
        if not path.is_file():
            raise Invalid(f"{self.folder} has no {path.name}, which config.yaml names as {key}; it belongs "
                          "to IndexTTS-2. Run\n"
                          f"    hf download IndexTeam/IndexTTS-2 {path.name} --local-dir {self.folder}")
        return path

    def part(self, key):
        """Where models.find_parts has found a part."""
        if key in self.extra:
            return Path(self.extra[key])
        part = PARTS[key]
        target = self.folder / "hf_cache"
        fetch = f"hf download {part.repository} {part.file}".rstrip()
        if part.file:
            way = f"{fetch} --local-dir {target} and name the file {target / part.names[0]}"
        else:
            way = f"{fetch} --local-dir {target / part.names[0]}"
        raise Invalid(f"{self.folder}: {part.names[0]} of {part.repository} is missing, which is needed "
                      f"{part.purpose}. Looked in the folder, its hf_cache, beside it and in the hub cache. "
                      f"Nothing is downloaded; run\n    {way}\nor give its path as extra.{key}.")


class Spoken(NamedTuple):
    """What a language model said."""

    codes: torch.Tensor  # (n,)
    states: torch.Tensor | None  # (n, D), the state that predicted each of them
    frames: int  # of the mel that they become


class Reference(NamedTuple):
    """What speaking takes from a prompt, apart from the language model's own encoders."""

    features: torch.Tensor  # (T, F) of the prompt by way of 22 kHz
    emotion: torch.Tensor  # (T', F) of the prompt as an emotion, read at 16 kHz where it is a file
    style: torch.Tensor  # (S,)
    condition: torch.Tensor  # (1, Tm, C), the prompt's content
    mel: torch.Tensor  # (1, M, Tm)


class Chain:
    """model.codec of IndexTTS2. Parts are attributes that load themselves."""

    def __init__(self, places, drawn=None):
        """drawn: {name: part} instead of the files, for measuring."""
        self.places, self.parts, self.references = places, drawn or {}, {}
        self.drawn = drawn is not None
        self.device, self.low_vram = torch.device("cpu"), False
        self.settings = s2mel.mel_settings(places.config["s2mel"])
        self.sample_rate = self.settings["rate"]

    def noise(self):
        """Three seconds, the prompt of a model that only serves to measure."""
        return 0.1 * torch.randn(3 * self.sample_rate, generator=torch.Generator().manual_seed(0))

    # ---------------------------------------------------------------------------------- parts

    def part(self, name):
        if name not in self.parts:
            self.parts[name] = self._load(name)
        return self.parts[name]

    def _load(self, name):
        places = self.places
        if name == "w2v_bert":
            return w2vbert.load(places.part(name), LAYERS)
        if name == "semantic_codec":
            return repcodec.load(places.part(name))
        if name == "campplus":
            return campplus.load(places.part(name))
        if name == "bigvgan":
            return bigvgan.load(places.part(name))
        return s2mel.load(places.file("s2mel_checkpoint", "s2mel.pth"), places.config["s2mel"])

    @contextlib.contextmanager
    def on(self, name):
        """A part on the device; with low_vram it goes back to the CPU afterwards."""
        part = self.part(name).to(self.device)
        try:
            yield part
        finally:
            if self.low_vram and self.device.type != "cpu":
                part.to("cpu")

    def to(self, device):
        """Where the parts compute from now on; those that are loaded go there."""
        self.device = torch.device(device)
        for part in self.parts.values():
            part.to("cpu" if self.low_vram else self.device)
        return self

    def parameters(self):
        """Of what is loaded; nothing at first."""
        for part in self.parts.values():
            yield from part.parameters()

    @property
    def statistics(self):
        """(mean, standard deviation) of the features; the file holds the variance."""
        if "statistics" not in self.__dict__:
            path = self.places.file("w2v_stat", "wav2vec2bert_stats.pt")
            stored = checkpoint.read(path)
            missing = {"mean", "var"} - set(stored)
            if missing:
                raise Invalid(f"{path} has no {' and no '.join(sorted(missing))}; is it "
                              "wav2vec2bert_stats.pt of IndexTTS-2?")
            self.__dict__["statistics"] = stored["mean"].load().float(), stored["var"].load().float().sqrt()
        return self.__dict__["statistics"]

    def fingerprint(self):
        """Names what codes and features are made with, by spots of the files: nothing is loaded for it."""
        if self.drawn:
            return "drawn"
        found = [self.places.part(name) for name in ("w2v_bert", "semantic_codec")]
        found.append(self.places.file("w2v_stat", "wav2vec2bert_stats.pt"))
        return f"{zlib.crc32(repr([spots(path) for path in found]).encode()):08x}"

    # ---------------------------------------------------------------------------------- recordings to codes

    def features(self, wave):
        """(n,) at 16 kHz -> (T, F), normalised. After an odd number of filter bank frames the last row is of
        padding."""
        inputs = audio.w2vbert_features(wave)
        mean, deviation = self.statistics
        with self.on("w2v_bert") as model:
            state = model(inputs[None], [audio.w2vbert_valid(wave.shape[-1])])[0]
        return (state.cpu() - mean) / deviation

    def codes(self, features):
        """(T, F) -> (T,) int64"""
        with self.on("semantic_codec") as model:
            return model.quantize(features[None])[0][0].cpu()

    def low_rate(self, wave):
        return audio.resample(wave, self.sample_rate, RATE)

    def encode(self, wave):
        """(n,) at sample_rate -> codes (1, T) int64. They say what is spoken, not by whom: decode takes the
        voice apart."""
        return self.codes(self.features(self.low_rate(wave)))[None]

    # ---------------------------------------------------------------------------------- prompts

    def listen(self, source, rate, what="the prompt"):
        """(n,) at `rate` of a path or of samples at sample_rate: a voice, at most 15 s of it."""
        if torch.is_tensor(source) and source.ndim != 1:
            raise Invalid(f"{what} is of shape {list(source.shape)}; expected a path or samples (n,). Codes "
                          "alone do not hold the voice.")
        if torch.is_tensor(source):
            wave = audio.resample(source.float(), self.sample_rate, rate)
        else:
            wave = audio.read(source, rate)[0]
        name = what if torch.is_tensor(source) else f"{what} {source}"
        seconds = len(wave) / rate
        if seconds < SHORTEST:
            raise Invalid(f"{name} lasts {seconds:.3f} s; at least {SHORTEST} s are needed, and 3 to 10 s "
                          "are best")
        wave = wave[: PROMPT_SECONDS * rate]
        if float(wave.abs().max()) < SILENCE:
            raise Invalid(f"{name} is silent (its loudest sample is {float(wave.abs().max()):.1e}); choose "
                          "a clip with the voice in it")
        return wave

    def too_long(self, source):
        """Seconds of a prompt where only its beginning is used, else 0."""
        seconds = len(source) / self.sample_rate if torch.is_tensor(source) else audio.info(source).seconds
        return seconds if seconds > PROMPT_SECONDS else 0

    def emotion(self, source):
        """(T, F) of a clip whose emotion is wanted. A file is read straight at 16 kHz, not by way of 22 kHz
        as a voice is."""
        return self.features(self.listen(source, RATE, "the emotion clip"))

    def reference(self, source):
        """Everything that speaking takes from a prompt, kept by the content of its file."""
        if torch.is_tensor(source):
            content = source.float().numpy().tobytes()
        elif Path(source).is_file():
            content = Path(source).read_bytes()
        else:
            raise Invalid(f"the prompt {source}: no such file")
        key = (torch.is_tensor(source), hashlib.sha256(content).hexdigest())
        if key not in self.references:
            if len(self.references) >= REFERENCES:
                del self.references[next(iter(self.references))]
            self.references[key] = self._reference(source)
        return self.references[key]

    @torch.no_grad()
    def _reference(self, source):
        wave = self.listen(source, self.sample_rate)
        low = self.low_rate(wave)
        features = self.features(low)
        emotion = features if torch.is_tensor(source) else self.emotion(source)
        mel = audio.mel_spectrogram(wave, **self.settings)[None]
        with self.on("campplus") as model:
            style = model.embed(low).cpu()
        with self.on("semantic_codec") as model:
            vectors = model.quantize(features[None])[1]
        with self.on("s2mel") as model:
            condition = model.content(vectors, frames=mel.shape[-1]).cpu()
        return Reference(features, emotion, style, condition, mel)

    def style(self, source):
        """(S,), the voice alone."""
        with self.on("campplus") as model:
            return model.embed(self.low_rate(self.listen(source, self.sample_rate))).cpu()

    # ---------------------------------------------------------------------------------- codes to sound

    @torch.no_grad()
    def mel(self, spoken, reference, noise, solver):
        """(1, M, frames) of what was said, in the voice of the reference, or in none without one.

        noise (M, prompt + frames), standard normal; solver: steps and cfg_rate.
        """
        with self.on("semantic_codec") as model:
            vectors = model.vectors(spoken.codes[None])
        device = vectors.device
        with self.on("s2mel") as model:
            states = None if spoken.states is None else spoken.states[None].to(device, torch.float32)
            content = model.content(vectors, states, spoken.frames)
            if reference is None:
                prompt = torch.zeros(1, model.config.mels, 0, device=device)
                style = torch.zeros(1, model.config.style, device=device)
            else:
                content = torch.cat([reference.condition.to(device), content], 1)
                prompt, style = reference.mel.to(device), reference.style[None].to(device)
            mel = model.solve(content, prompt, style, noise[None].to(device), **solver)
        return mel[..., prompt.shape[-1] :]

    @torch.no_grad()
    def sound(self, mel):
        """(1, M, T) -> chunks (n,), the first one short."""
        first = min(FIRST_FRAMES, mel.shape[-1])
        with self.on("bigvgan") as model:
            reach = model.context()
            head = model(mel[..., : first + reach])
            yield head[0, : first * model.hop].cpu()
            start = max(0, first - reach)
            skip = (first - start) * model.hop
            for chunk in model.chunks(mel[..., start:], FRAMES) if first < mel.shape[-1] else ():
                part = chunk[0, skip:]
                skip = max(0, skip - chunk.shape[-1])
                if len(part):
                    yield part.cpu()

    def decode(self, codes):
        """codes (1, T) or (T,) -> (n,) at sample_rate in no voice in particular: neither prompt nor states
        of a language
        model. It tells what the codes hold, and covers the recording that they were made of."""
        codes = codes.reshape(-1)
        if not len(codes):
            return torch.zeros(0)
        seconds = len(codes) / CODES_PER_SECOND + 0.025  # a recording may go on so long without another code
        hop = self.settings["hop"]
        frames = math.ceil(seconds * self.sample_rate / hop)
        noise = torch.randn(self.settings["n_mels"], frames, generator=torch.Generator().manual_seed(0))
        mel = self.mel(Spoken(codes, None, frames), None, noise, dict(steps=10, cfg_rate=0.0))
        return torch.cat(list(self.sound(mel)))

    def stream(self):
        """An object whose decode takes codes piece by piece. Frames of a mel see each other, so pieces are
        independent."""
        return self


# --------------------------------------------------------------------------------------- shapes for measuring


class Widths(NamedTuple):
    """Of a chain that is drawn, not loaded."""

    features: int
    bins: int
    states: int  # of the language model
    part: int  # of everything inside; 512 is about the published size
    layers: int


def blank(widths):
    """A chain with drawn weights, for measuring only."""
    w, mels, style = widths, 80, 192
    heads = max(1, w.part // 64)
    inner = 4 * w.part
    spect = dict(n_fft=1024, win_length=1024, hop_length=256, n_mels=mels, fmin=0, fmax="None")
    config = {"s2mel": {"preprocess_params": {"sr": 22050, "spect_params": spect}}}
    semantic = dict(channels=w.features, width=w.part, inner=inner, layers=w.layers, kernel=7, block_kernel=7)
    mel = s2mel.Config(
        heads=heads, mels=mels, content=w.part, style=style, width=w.part, hidden=3 * w.part, depth=w.layers,
        frequencies=128, wavenet=w.part, wavenet_layers=8, wavenet_kernel=5, semantic=w.features,
        regulator=w.part, regulator_convs=4, gpt_layer=(w.states, 256, 128, w.features))
    vocoder = bigvgan.Config(
        upsample_rates=[4, 4, 2, 2, 2, 2], upsample_kernel_sizes=[8, 8, 4, 4, 4, 4],
        upsample_initial_channel=3 * w.part, resblock_kernel_sizes=[3, 7, 11],
        resblock_dilation_sizes=[[1, 3, 5]] * 3, num_mels=mels, sampling_rate=22050, use_tanh_at_final=False,
        use_bias_at_final=False)
    frozen = {
        "w2v_bert": w2vbert.W2vBert(160, w.layers, width=w.features, inner=4 * w.features, heads=heads,
                                    left=64, right=8, kernel=31, eps=1e-5),
        "semantic_codec": repcodec.RepCodec(semantic, w.features, w.bins, 8),
        "campplus": campplus.CAMPPlus(campplus.Config(10, 32, (2, 2), 128, (12, 24, 16), 32, 128, style)),
        "s2mel": s2mel.S2Mel(mel),
        "bigvgan": bigvgan.BigVGAN(vocoder)}
    for model in frozen.values():
        draw(model)
        model.eval().requires_grad_(False)
    chain = Chain(Places(Path(), config, {}), frozen)
    chain.__dict__["statistics"] = torch.zeros(w.features), torch.ones(w.features)
    return chain


@torch.no_grad()
def draw(model):
    """Weights that neither die out nor grow; norms one, biases and statistics as they are."""
    for name, p in (*model.named_parameters(), *model.named_buffers()):
        if p.ndim > 1 and p.is_floating_point():
            p.normal_(std=p[0].numel() ** -0.5)
        elif name.endswith("freqs"):
            p.copy_(torch.linspace(0, -math.log(1e4), len(p)).exp())
