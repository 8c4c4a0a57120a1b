"""Train a small AudioVAE, the codec of a VoxCPM, from scratch.

    python demo/train_audiovae.py --speech runs/demo/codec/codec.jsonl --save_path runs/demo/audiovae --minutes 6

    wav --encoder--> mean, log variance --noise--> z --decoder--> wav'
    loss = mel distance at six resolutions + KL held at a capacity + on a GPU: discriminators' verdict and features

Everything that trains a codec is in this file: it is the one exception to the project's single training loop, since a
codec has two optimizers and no text. The recipe is that of the Descript Audio Codec (arXiv 2306.06546) with a Gaussian
bottleneck in place of codebooks. What is special here:

- The noise on z is there for the language model's sake: what it generates is never exact, and a decoder that has only
  seen exact latents answers small errors with noise. How much noise is set by the KL's capacity (arXiv 1804.03599): the
  penalty is |KL - capacity|, so the bottleneck carries that many nats per channel and frame, no more and no less. The
  means are normalised over the batch first: otherwise a constant offset would pay the KL and carry nothing.
- A flow-matching model starts from noise of variance one and the published codec is used without any scaling. So at the
  end the normalisation is folded into fc_mu: latents of mean zero and variance one, as the decoder has always seen them.
- Progress is steps / num_iters or seconds / minutes, whichever is further; the learning rate and the discriminators'
  entry follow it. A killed run goes on from its last state; with num_iters alone it does so bit by bit on a CPU.
"""
import copy
import dataclasses
import json
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import configs
from models.codecs import audiovae
from models.parts import Invalid, audio, checkpoint, opt


@dataclass
class TrainAudioVAE:
    """Train a small AudioVAE from scratch and write it in the published format."""
    speech: str = opt("runs/demo/codec/codec.jsonl", "manifest of the speech to train on; the last 16 clips are held out")
    save_path: str = opt("runs/demo/audiovae", "folder for the codec, the state to resume from, the log and reconstructions")
    config: str = opt("demo/recipe/config.json", "its audio_vae_config says how large the codec is")
    minutes: float = opt(6.0, "training time over all parts; 0: only num_iters counts")
    num_iters: int = opt(0, "steps; 0: only minutes counts")
    pause_minutes: float = opt(0.0, "leave after so long in this process, state saved; the same command goes on; 0: never")
    batch_size: int = opt(16, "segments per step")
    seconds: float = opt(2.0, "length of a segment; with less than the codec remembers, about 0.8 seconds, it fails on whole clips")
    learning_rate: float = opt(6e-4, "peak; falls to a twentieth along a half cosine; the discriminators take half")
    adversarial: str = opt("auto", "on, off, or auto: on where there is a GPU", choices=("auto", "on", "off"))
    adversarial_from: float = opt(0.25, "progress at which the discriminators come in")
    capacity: float = opt(1.5, "nats per latent channel and frame that the bottleneck carries")
    kl_weight: float = opt(10.0, "price of a nat more or less than the capacity, per channel and frame")
    mel_weight: float = opt(15.0, "of the mel distance")
    feature_weight: float = opt(2.0, "of the distance between the discriminators' features")
    max_grad_norm: float = opt(10.0, "clipping of the codec's gradient")
    average: float = opt(0.998, "what is written is the running average of the weights with this memory per step")
    compile: bool = opt(False, "torch.compile codec and discriminators: faster steps after a slow start")
    log_interval: int = opt(50, "steps between lines in the log")
    save_interval: int = opt(500, "steps between states to resume from")
    seed: int = opt(0, "of initial weights and all draws")


# ------------------------------------------------------------------------------------------------ losses


class MelDistance(nn.Module):
    """Mean |log10 difference| of mel spectrograms at six resolutions, each with a quarter window of hop. (B, 1, n) twice.

    A sine of full scale has the magnitude 1, to which a floor of -70 dB is added: what is far below it need not be matched,
    and unlike a clamped one a silent output still feels which way is louder.
    """

    RESOLUTIONS = ((2048, 128), (1024, 80), (512, 40), (256, 20), (128, 10), (64, 5))  # window, mels

    def __init__(self, rate):
        super().__init__()
        for window, mels in self.RESOLUTIONS:
            low, high = 0.0, 2595 * math.log10(1 + rate / 2 / 700)
            edges = 700 * (10 ** (torch.linspace(low, high, mels + 2) / 2595) - 1)
            bins = torch.linspace(0, rate / 2, window // 2 + 1)[None]
            up, down = (bins - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None], (edges[2:, None] - bins) / (edges[2:] - edges[1:-1])[:, None]
            bank = torch.minimum(up, down).clamp(min=0)
            self.register_buffer(f"bank{window}", bank / bank.sum(1, keepdim=True).clamp(min=1e-3))
            self.register_buffer(f"window{window}", torch.hann_window(window))

    def forward(self, x, y):
        total = 0.0
        for window, _ in self.RESOLUTIONS:
            mels = [torch.log10(getattr(self, f"bank{window}") @ (spectrum(s, window, getattr(self, f"window{window}")).abs() * (4 / window)) + 3e-4)
                    for s in (x, y)]
            total = total + (mels[0] - mels[1]).abs().mean()
        return total


def spectrum(x, size, window):
    """(B, 1, n) -> complex (B, size/2+1, frames)"""
    return torch.stft(x[:, 0].float(), size, size // 4, window=window, return_complex=True)


class PeriodDiscriminator(nn.Module):
    """Folds the signal into rows of one period, so that what repeats stands in a column (HiFi-GAN, arXiv 2010.05646)."""

    def __init__(self, period):
        super().__init__()
        self.period = period
        widths = (1, 16, 32, 64, 128)
        self.layers = nn.ModuleList(weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0))) for a, b in zip(widths, widths[1:]))
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, (3, 1), 1, (1, 0)))

    def forward(self, x):
        x = F.pad(x, (0, -x.shape[2] % self.period), mode="reflect")
        x, features = x.view(len(x), 1, -1, self.period), []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        return self.last(x), features


class SpectrumDiscriminator(nn.Module):
    """Looks at real and imaginary part of a spectrogram (EnCodec, arXiv 2210.13438)."""

    def __init__(self, size):
        super().__init__()
        self.size = size
        self.register_buffer("window", torch.hann_window(size))
        widths = (2, 24, 24, 24, 24)
        self.layers = nn.ModuleList(weight_norm(nn.Conv2d(a, b, (9, 3), (1 if i == 0 else 2, 1), (4, 1)))
                                    for i, (a, b) in enumerate(zip(widths, widths[1:])))
        self.last = weight_norm(nn.Conv2d(widths[-1], 1, 3, 1, 1))

    def forward(self, x):
        s = spectrum(x, self.size, self.window)
        x = torch.view_as_real(s).permute(0, 3, 1, 2) * (8 / self.size ** 0.5)  # brings speech to about unit scale
        features = []
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.1)
            features.append(x)
        return self.last(x), features


class Discriminators(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([PeriodDiscriminator(p) for p in (2, 3, 5, 7, 11)] + [SpectrumDiscriminator(n) for n in (1024, 512, 256)])

    def forward(self, x):
        """(B, 1, n) -> [(verdict, [features])]"""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda):
            return [part(x) for part in self.parts]


def verdict_loss(verdicts, wanted):
    """Least squares: each verdict should be `wanted`, 1 for genuine."""
    return sum((v.float() - wanted).square().mean() for v, _ in verdicts)


# ------------------------------------------------------------------------------------------------ the codec in training


def forward(codec, wav, noise):
    """wav (B, 1, n), noise (B, D, T) -> reconstruction (B, 1, n), mean KL in nats per channel and frame."""
    hidden = codec.encoder(wav)
    mu = F.batch_norm(codec.encoder.fc_mu(hidden), None, None, training=True)  # each channel: mean 0, variance 1
    logvar = codec.encoder.fc_logvar(hidden).clamp(-12, 4)
    kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).mean()
    return codec.decoder(mu + noise * (0.5 * logvar).exp()), kl


@torch.no_grad()
def level(codec, wav):
    """Scale every convolution so that what it makes of wav (B, 1, n) has variance one, the last one that of speech.

    PyTorch's own initial values take about two thirds of the variance in every layer, so a deep codec would begin almost silent.
    """
    def scale(layer, _, out):
        size = out.std() / (wav.std() if layer is last else 1)
        layer.weight /= size
        return out / size

    last, layers = codec.decoder.model[-1], [m for m in codec.modules() if isinstance(m, (nn.Conv1d, nn.ConvTranspose1d))]
    for layer in layers:
        layer.bias.zero_()
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    forward(codec, wav, torch.zeros(()))
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def fold(codec, mean, std):
    """The normalisation of the latents, channel by channel (D,), into fc_mu."""
    codec.encoder.fc_mu.weight /= std[:, None, None]
    codec.encoder.fc_mu.bias.sub_(mean).div_(std)


def load_speech(manifest, rate):
    """Every clip of a manifest, one int16 tensor each."""
    manifest = Path(manifest)
    if not manifest.is_file():
        raise Invalid(f"no manifest at {manifest}; demo/make_speech.py --part codec makes one")
    rows = [json.loads(line) for line in manifest.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(rows) < 17:
        raise Invalid(f"{manifest} has {len(rows)} clips; 16 are held out, so at least 17 are needed")
    return [(audio.read(manifest.parent / r["audio"], rate)[0] * 32767).round().to(torch.int16) for r in rows]


class Segments:
    """Random segments of one long tensor on the device; a third of them begin where a clip begins, as decoding will."""

    def __init__(self, clips, length, device):
        gap = torch.zeros(length, dtype=torch.int16)  # so that a segment near the end of a clip runs into silence
        parts, starts, at = [], [], 0
        for clip in clips:
            starts.append((at, len(clip)))
            parts += [clip, gap]
            at += len(clip) + length
        self.audio, self.starts, self.length = torch.cat(parts).to(device), torch.tensor(starts), length

    def draw(self, B, generator):
        clip = torch.randint(len(self.starts), (B,), generator=generator)
        first, n = self.starts[clip].T
        inside = (torch.rand(B, generator=generator) * (n - self.length // 2).clamp(min=1)).long()
        inside = torch.where(torch.rand(B, generator=generator) < 1 / 3, 0, inside)
        gain = 10 ** ((torch.rand(B, generator=generator) * 12 - 9) / 20)  # -9 to +3 dB
        index = (first + inside).to(self.audio.device)[:, None] + torch.arange(self.length, device=self.audio.device)
        return (self.audio[index].float() / 32768 * gain.to(index.device)[:, None])[:, None].clamp(-1, 1)  # (B, 1, n)


# ------------------------------------------------------------------------------------------------ the run


def main():
    cfg = configs.parse(TrainAudioVAE)
    if not cfg.minutes and not cfg.num_iters:
        raise configs.Usage("minutes and num_iters are both 0; one of them must say when training ends")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adversarial = cfg.adversarial == "on" or cfg.adversarial == "auto" and device == "cuda"
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    folder = Path(cfg.save_path)
    folder.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(cfg.seed)
    numbers = audiovae.settings(checkpoint.read_json(cfg.config).get("audio_vae_config"), audiovae.V1)
    codec, average = (audiovae.AudioVAE(**numbers).to(device) for _ in range(2))
    clips = load_speech(cfg.speech, codec.sample_rate)
    held, clips = clips[-16:], clips[:-16]
    length = round(cfg.seconds * codec.sample_rate / codec.hop) * codec.hop
    segments = Segments(clips, length, device)
    average.eval().requires_grad_(False)
    judges, mel = Discriminators().to(device), MelDistance(codec.sample_rate).to(device)
    own, others, kept = list(codec.parameters()), list(judges.parameters()), list(average.parameters())
    level(codec, segments.draw(16, torch.Generator().manual_seed(cfg.seed)))
    average.load_state_dict(codec.state_dict())
    optimizers = [torch.optim.AdamW(p, cfg.learning_rate, betas=(0.8, 0.99), weight_decay=1e-3, fused=True) for p in (own, others)]
    run, judge = (torch.compile(f) if cfg.compile else f for f in (forward, judges))

    print(f"codec {sum(p.numel() for p in own):,} parameters, {codec.latent_dim} channels at {codec.sample_rate / codec.hop:g} Hz; "
          f"{sum(map(len, clips)) / codec.sample_rate / 3600:.2f} h of speech; {device}, adversarial {'on' if adversarial else 'off'}", flush=True)

    step, seconds, begun = 0, 0.0, time.monotonic()
    state_path = folder / "state.pth"
    if state_path.exists():
        state = torch.load(state_path, map_location=device, weights_only=True)
        if state["settings"] != comparable(cfg):
            raise Invalid(f"{state_path} belongs to a run with other settings; choose another save_path or remove it")
        step, seconds = state["step"], state["seconds"]
        for module, values in ((codec, "codec"), (average, "average"), (judges, "judges")):
            module.load_state_dict(state[values])
        for optimizer, values in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(values)
        print(f"going on from step {step}", flush=True)
    log = open(folder / "metrics.jsonl", "a", encoding="utf-8")
    before, first, sums, paused = seconds, step, {}, False

    while not paused:
        seconds = before + time.monotonic() - begun
        progress = max(step / cfg.num_iters if cfg.num_iters else 0, seconds / (60 * cfg.minutes) if cfg.minutes else 0)
        paused = progress < 1 and step > first and 0 < 60 * cfg.pause_minutes < time.monotonic() - begun
        if step and (step % cfg.save_interval == 0 or paused or progress >= 1):
            state = dict(step=step, seconds=seconds, settings=comparable(cfg), codec=codec.state_dict(), average=average.state_dict(),
                         judges=judges.state_dict(), optimizers=[o.state_dict() for o in optimizers])
            torch.save(state, folder / "state.tmp")
            os.replace(folder / "state.tmp", state_path)
        if paused or progress >= 1:
            break
        rate = cfg.learning_rate * min(1, (step + 1) / 200) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        for optimizer, share in zip(optimizers, (1.0, 0.5)):
            optimizer.param_groups[0]["lr"] = share * rate

        draws = torch.Generator().manual_seed(cfg.seed * 1_000_003 + step)
        wav = segments.draw(cfg.batch_size, draws)
        noise = torch.randn(cfg.batch_size, codec.latent_dim, length // codec.hop, generator=draws).to(device)
        judged = adversarial and progress >= cfg.adversarial_from
        if judged and not (folder / "spectral.safetensors").exists():  # in case the discriminators spoil it
            finish(cfg, copy.deepcopy(average), mel, clips, held, folder, device, "spectral")
        made, kl = run(codec, wav, noise)
        losses = {"mel": mel(wav, made), "kl": kl}
        total = cfg.mel_weight * losses["mel"] + cfg.kl_weight * (kl - cfg.capacity).abs()
        if judged:
            both = judge(torch.cat([wav, made.detach()]))
            genuine, false = [[(v.chunk(2)[i], None) for v, _ in both] for i in (0, 1)]
            losses["judges"] = verdict_loss(genuine, 1) + verdict_loss(false, 0)
            optimizers[1].zero_grad()
            losses["judges"].backward()
            nn.utils.clip_grad_norm_(others, 10)
            optimizers[1].step()
            judges.requires_grad_(False)
            verdicts = judge(torch.cat([made, wav]))
            losses["adversarial"] = verdict_loss([(v.chunk(2)[0], None) for v, _ in verdicts], 1)
            losses["features"] = sum((f.chunk(2)[0] - f.chunk(2)[1].detach()).abs().float().mean() for _, fs in verdicts for f in fs)
            judges.requires_grad_(True)
            total = total + losses["adversarial"] + cfg.feature_weight * losses["features"]
        optimizers[0].zero_grad()
        total.backward()
        norm = nn.utils.clip_grad_norm_(own, cfg.max_grad_norm)
        if torch.isfinite(norm):
            optimizers[0].step()
        memory = min(cfg.average, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(kept, own, 1 - memory)

        step += 1
        for k, v in losses.items():
            sums[k] = sums.get(k, 0) + v.detach()
        sums["skipped"] = sums.get("skipped", 0) + (~torch.isfinite(norm)).float()
        if step % cfg.log_interval == 0:
            means = {k: float(v) / cfg.log_interval for k, v in sums.items()}
            sums = {}
            print(f"step {step} | {100 * progress:.0f} % | " + ", ".join(f"{k} {v:.3f}" for k, v in means.items())
                  + f" | lr {rate:.1e} | {seconds:.0f} s", flush=True)
            log.write(json.dumps({"step": step, "seconds": round(seconds, 1), "lr": rate, **means}) + "\n")
            log.flush()
    if paused:
        print(f"paused at step {step}; the same command goes on")
        return
    finish(cfg, average, mel, clips, held, folder, device, "audiovae")


def comparable(cfg):
    """The settings that a resumed run must share: not its lengths, intervals and places."""
    free = ("minutes", "num_iters", "pause_minutes", "log_interval", "save_interval", "save_path", "speech", "compile", "adversarial")
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in free}


@torch.no_grad()
def finish(cfg, codec, mel, clips, held, folder, device, name):
    """Unit variance, the published file in float16, reconstructions of the held-out clips."""
    def latents_of(some):
        return torch.cat([codec.encode(c.float() / 32768) for c in some])

    before = latents_of(clips[:100])
    fold(codec, before.mean(0), before.std(0))
    after = latents_of(clips[:100])
    path = folder / f"{name}.safetensors"
    # Half the size at no cost: rounding a weight to float16 moves it by at most one part in two thousand.
    state = {k: v.half() for k, v in codec.published_state_dict().items()}
    save_file(state, folder / f"{name}.tmp", metadata={"format": "pt"})
    os.replace(folder / f"{name}.tmp", path)
    written = audiovae.load(path, checkpoint.read_json(cfg.config).get("audio_vae_config"), audiovae.V1, device)
    distance, lost = 0.0, []
    for i, clip in enumerate(held):
        wav = clip.float().to(device) / 32768
        made, exact = written.decode(written.encode(wav)), codec.decode(codec.encode(wav))
        distance += float(mel(wav[None, None], made[None, None, :len(wav)])) / len(held)
        lost.append(float(10 * torch.log10((exact - made).square().sum() / exact.square().sum().clamp(min=1e-12))))
        if i < 4:
            audio.write(folder / f"held_{i}_original.wav", wav.cpu(), codec.sample_rate)
            audio.write(folder / f"held_{i}_{name}.wav", made.cpu(), codec.sample_rate)
    report = {"latent_std": round(float(after.std()), 3), "held_out_mel_distance": round(distance, 4),
              "float16_error_db": round(max(lost), 1)}
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)\n{json.dumps(report, indent=1)}")


if __name__ == "__main__":
    configs.run(main)
