"""Speed and memory of the frozen encoders at their real shapes, random weights: python -m tests.bench_parts [--threads 2].

`compare` runs transformers' own classes and ours on the same 20 clips of 2 to 12 s in turn, clip by clip, in one process,
so that both see the same machine; each clip counts with the best of its runs. `once` loads one part from a file of its
published layout in a process of its own and encodes ten seconds. `--decoding` lets transformers' GPT-2 and IndexTTS2's
speak in turn, beside the time that it takes to read their weights; `--chain` splits IndexTTS2's speaking by stage.
"""
import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from models import indextts2
from models.codecs import higgs_codec, repcodec, w2vbert
from models.parts import audio, checkpoint, gpt_steps
from tests import test_higgs_codec, test_repcodec, test_w2vbert

CLIPS = [2 + 10 * i / 19 for i in range(20)]  # seconds
W2V = dict(features=160, width=1024, inner=4096, layers=24, heads=16, left=64, right=8, kernel=31)
REP = dict(bins=8192, channels=1024, latent=8, width=384, inner=2048, layers=12)


def stored(tensors):
    return {k: checkpoint.Stored(v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()}


def random(shapes):
    """Tensors of these shapes, matrices with deviation 1/sqrt(fan in), vectors of ones; quicker than tests.tiny."""
    g = torch.Generator().manual_seed(0)
    return {k: torch.ones(s) if max(s) == torch.Size(s).numel() else torch.randn(s, generator=g) / torch.Size(s[1:]).numel() ** 0.5
            for k, s in shapes.items()}


def higgs(clips):
    """(name, theirs, ours) per clip, each a call that gives the same tensors: HuBERT's mean state and DAC's latents."""
    from transformers import DacConfig, DacModel, HubertConfig, HubertModel

    torch.manual_seed(0)
    hubert = HubertModel(HubertConfig()).eval()
    dac = DacModel(DacConfig(encoder_hidden_size=64, decoder_hidden_size=1024, hidden_size=256, downsampling_ratios=[8, 5, 4, 2, 3],
                             upsampling_ratios=[8, 5, 4, 2, 3])).eval()
    state = test_higgs_codec.transformers_names(random(test_higgs_codec.shapes(**test_higgs_codec.REAL)))
    state |= {f"semantic_model.{k}": v for k, v in hubert.state_dict().items() if k != "masked_spec_embed"}
    state |= {f"acoustic_encoder.{k}": v for k, v in dac.encoder.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file({k: v.contiguous() for k, v in state.items()}, Path(folder) / "model.safetensors")
        codec = higgs_codec.load(folder)
    for wave in clips:
        heard = torch.nn.functional.pad(audio.resample(wave, 24000, 16000), (160, 160))[None]
        pad = codec._plan(len(wave))[1]
        x = torch.nn.functional.pad(wave, (pad, pad))[None, None]

        def theirs(heard=heard, x=x):
            states = hubert(heard, output_hidden_states=True).hidden_states
            return torch.stack(states, 1).mean(1)[:, ::2], dac.encoder(x)

        def ours(heard=heard, x=x):
            return codec.semantic_model(heard, [heard.shape[1]], 2)[0], codec.acoustic_encoder(x[:, :, None], [x.shape[2]])[:, :, 0]

        yield theirs, ours


def w2v(clips):
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    torch.manual_seed(0)
    reference = Wav2Vec2BertModel(Wav2Vec2BertConfig()).eval()
    tensors = stored(reference.state_dict())
    model = w2vbert.build(tensors, {}, 17, "w2v-BERT")
    checkpoint.fill(model, tensors, None, w2vbert.unused(tensors, 17))
    for wave in clips:
        wave = audio.resample(wave, 24000, 16000)
        x, valid = audio.w2vbert_features(wave)[None], audio.w2vbert_valid(len(wave))
        mask = (torch.arange(x.shape[1]) < valid).long()[None]
        yield (lambda x=x, mask=mask: (reference(x, attention_mask=mask, output_hidden_states=True).hidden_states[17],),
               lambda x=x, valid=valid: (model(x, [valid]),))


def compare(pairs, repeats=3):
    """Seconds of theirs and of ours, summed over the clips, and the largest difference of their outputs.

    cpu: processor seconds of all threads. On a machine that does other work they say more than the clock does.
    """
    clock, cpu, worst = [0.0, 0.0], [0.0, 0.0], 0.0
    with torch.no_grad():
        for calls in pairs:
            best = [[float("inf")] * 2, [float("inf")] * 2]
            for _ in range(repeats):
                out = []
                for i, call in enumerate(calls):
                    start = time.perf_counter(), time.process_time()
                    out.append(call())
                    best[i] = [min(b, now - then) for b, now, then in zip(best[i], (time.perf_counter(), time.process_time()), start)]
            worst = max(worst, *(float((a - b).abs().max()) for a, b in zip(*out)))
            clock, cpu = ([s + best[i][j] for i, s in enumerate(sums)] for j, sums in enumerate((clock, cpu)))
    return {"theirs_s": clock[0], "ours_s": clock[1], "faster": clock[0] / clock[1],
            "theirs_cpu_s": cpu[0], "ours_cpu_s": cpu[1], "faster_cpu": cpu[0] / cpu[1], "difference": worst}


def once(part, threads):
    """Write a file of the published layout, load it in a process of its own, encode 10 s there. -> what that process printed"""
    shapes = {"higgs_codec": test_higgs_codec.shapes(**test_higgs_codec.REAL), "w2vbert": test_w2vbert.shapes(**W2V),
              "repcodec": test_repcodec.shapes(**REP)}[part]
    with tempfile.TemporaryDirectory() as folder:
        save_file(random(shapes), Path(folder) / "model.safetensors")
        done = subprocess.run([sys.executable, "-m", "tests.bench_parts", "--threads", str(threads), "--inside", part, folder],
                              capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def inside(part, folder):
    def peak():  # VmHWM begins anew with the process; getrusage would begin with what the parent held when it forked
        return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 2**20

    base, start = peak(), time.perf_counter()
    model = {"higgs_codec": higgs_codec, "w2vbert": w2vbert, "repcodec": repcodec}[part].load(folder)
    loaded, size = time.perf_counter() - start, sum(p.numel() * 4 for p in model.parameters()) / 2**30
    after_load, start = peak(), time.perf_counter()
    wave = 0.1 * torch.randn(240000, generator=torch.Generator().manual_seed(0))
    out = {}
    if part == "higgs_codec":
        codes = model.encode(wave)
        out["encode_s"], start = time.perf_counter() - start, time.perf_counter()
        out["shape"], sound = list(codes.shape), model.decode(codes)
        out["decode_s"], out["samples"] = time.perf_counter() - start, len(sound)
    elif part == "w2vbert":
        out["shape"] = list(model(audio.w2vbert_features(wave[:160000])[None]).shape)
        out["encode_s"] = time.perf_counter() - start
    else:
        codes, _ = model.quantize(torch.randn(1, 500, 1024))
        out["encode_s"], out["shape"] = time.perf_counter() - start, list(codes.shape)
    print(json.dumps({"weights_GiB": size, "load_s": loaded, "peak_load_GiB": after_load - base, "peak_GiB": peak() - base, **out}))


MID = ("mid", "", torch.device("cpu"), torch.float32)
CODES = 150  # three seconds


def greedy(model, codes=CODES):
    """speak(): so many codes by IndexTTS2, of a voice that was heard before and a text of nine pieces."""
    request = model._request("X" * 9, seed=0, s=indextts2.Sampling())
    s = indextts2.Sampling(temperature=0, num_beams=1, min_len=codes, max_len=codes)
    job = indextts2.Job(model._prefix(request, request["segments"][0]).detach(), torch.Generator(), codes, "training")
    return lambda: model._search([job], s)


def greedy_by_transformers(model, codes=CODES):
    """speak(): as many by transformers' GPT-2 of that size with its cache, behind as many positions."""
    from transformers import DynamicCache, GPT2Config, GPT2Model

    c = model.config
    gpt = GPT2Model(GPT2Config(vocab_size=16, n_positions=c.latents + 2 + c.text_positions + c.mel_rows, n_embd=c.model_dim, n_layer=c.layers,
                               n_head=c.heads, attn_implementation="sdpa")).eval()
    first = torch.randn(1, c.latents + 2 + 11 + 1, c.model_dim)  # voice, speed, text with its marks, the start code

    @torch.no_grad()
    def speak():
        cache, x = DynamicCache(), first
        for i in range(codes):
            h = gpt(inputs_embeds=x, past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
            code = model.mel_head(model.final_norm(h)).argmax(-1)
            x = model.mel_embedding(code) + model.mel_pos_embedding.emb.weight[i + 1]

    return speak


def decoding(repeats):
    """Processor milliseconds per code of transformers and of ours, and what the weights of a step alone take: read once, and
    multiplied by one row each."""
    model = indextts2.blank(*MID)
    theirs = greedy_by_transformers(model)
    linears = [m for block in model.gpt.h for m in block.modules() if isinstance(m, torch.nn.Linear)] + [model.mel_head]
    rows = [torch.randn(1, m.in_features) for m in linears]
    of = gpt_steps.Products(1, model.mel_head.weight).of
    products = [of(m) for m in linears]

    @torch.inference_mode()
    def multiplied():
        for _ in range(CODES):
            for product, row in zip(products, rows):
                product(row)

    @torch.inference_mode()
    def read():
        for _ in range(CODES):
            for m in linears:
                m.weight.sum()

    calls = {"theirs": theirs, "ours": greedy(model), "products": multiplied, "read": read}
    times = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.process_time()
            call()
            times[name].append((time.process_time() - start) * 1e3 / CODES)
    medians = {name: statistics.median(values) for name, values in times.items()}
    weights = sum(m.weight.numel() * 4 for m in linears) / 1e6
    return {f"{name}_ms": round(value, 2) for name, value in medians.items()} | {
        "weights_MB": weights, "read_GB_per_s": weights / medians["read"], "faster": medians["theirs"] / medians["ours"],
        "at_most": medians["theirs"] / medians["read"]}


def chain(repeats):
    """Processor seconds of every stage for a second of sound, three seconds in a new voice with the usual settings: hearing the
    prompt, codes (three beams), the second pass for their states, S2Mel, BigVGAN."""
    model = indextts2.blank(*MID)
    s = indextts2.Sampling(min_len=CODES - 1, max_len=CODES)
    times = []

    def timed(call):
        start = time.process_time()
        out = call()
        times[-1].append(time.process_time() - start)
        return out

    for _ in range(repeats + 1):
        times.append([])
        model.codec.references.clear()
        request = timed(lambda: model._request("X" * 9, seed=0, s=s))
        _, codes = timed(lambda: next(model._run([request], s)))
        states = timed(lambda: model._latents(request, request["segments"][0], codes))
        mel = timed(lambda: model._mel(request, 0, (codes, states), s))
        sound = timed(lambda: torch.cat(list(model.codec.sound(mel))))
    seconds = len(sound) / model.out_sample_rate
    medians = [statistics.median(stage) / seconds for stage in zip(*times[1:])]
    return {"seconds": seconds, "rtf": sum(medians)} | dict(zip(("prompt", "codes", "states", "mel", "sound"), medians))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--clips", type=int, default=20)
    parser.add_argument("--once", action="store_true", help="load and run every part once instead")
    parser.add_argument("--decoding", action="store_true", help="a GPT-2 code by code instead")
    parser.add_argument("--chain", action="store_true", help="IndexTTS2's speaking by stage instead")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.inside:
        return inside(*args.inside)
    if args.once:
        for part in ("higgs_codec", "w2vbert", "repcodec"):
            print(part, json.dumps(once(part, args.threads)), flush=True)
        return
    if args.decoding or args.chain:
        return print(json.dumps((decoding if args.decoding else chain)(args.repeats)))
    g = torch.Generator().manual_seed(0)
    for name, pairs in (("HuBERT + DAC", higgs), ("w2v-BERT", w2v)):
        clips = [0.1 * torch.randn(round(24000 * s), generator=g) for s in CLIPS[:: len(CLIPS) // args.clips]]
        print(f"{name}, {len(clips)} clips, {sum(map(len, clips)) / 24000:.0f} s, {args.threads} threads: {json.dumps(compare(pairs(clips), args.repeats))}", flush=True)


if __name__ == "__main__":
    main()
