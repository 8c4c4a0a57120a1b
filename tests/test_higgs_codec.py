"""Higgs Audio's tokenizer against Boson's own code (golden tensors), HuBERT and DAC live against transformers, and its properties."""
import contextlib
import importlib
import json
import math
import re
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.codecs import higgs_codec
from models.parts import Invalid, audio, checkpoint
from tests import tiny

GOLDEN = load_file(Path(__file__).parent / "golden" / "higgs_codec.safetensors")
WAVE, LENGTHS = GOLDEN["wave"], [2880, 2998, 2999, 3511, 3512, 3700]
LAYOUTS = {"original": (602, 2204613703), "transformers": (527, 3607651866)}  # tensors, and the checksum over names and shapes
SMALL = dict(ratios=[8, 5, 4, 2, 3], width=4, latent=6, decoder=64, semantic=24, inner=32, layers=3, extractor=8, group=6,
             bins=32, size=5, stages=8, position=128)
REAL = dict(ratios=[8, 5, 4, 2, 3], width=64, latent=256, decoder=1024, semantic=768, inner=3072, layers=12, extractor=512, group=48,
            bins=1024, size=64, stages=8, position=128)


def shapes(ratios, width, latent, decoder, semantic, inner, layers, extractor, group, bins, size, stages, position):
    """Every tensor of a tokenizer in the original naming."""
    out = {}

    def conv(name, channels, out_channels, kernel, transposed=False):
        first, second = (channels, out_channels) if transposed else (out_channels, channels)
        out.update({f"{name}.weight_g": [first, 1, 1], f"{name}.weight_v": [first, second, kernel], f"{name}.bias": [out_channels]})

    def snake(name, channels):
        out[f"{name}.alpha"] = [1, channels, 1]

    def unit(name, channels):
        snake(f"{name}.block.0", channels)
        conv(f"{name}.block.1", channels, channels, 7)
        snake(f"{name}.block.2", channels)
        conv(f"{name}.block.3", channels, channels, 1)

    conv("encoder.block.0", 1, width, 7)
    for i, stride in enumerate(ratios):
        for j in range(3):
            unit(f"encoder.block.{i + 1}.block.{j}", width * 2**i)
        snake(f"encoder.block.{i + 1}.block.3", width * 2**i)
        conv(f"encoder.block.{i + 1}.block.4", width * 2**i, width * 2 ** (i + 1), 2 * stride)
    last = len(ratios)
    snake(f"encoder.block.{last + 1}", width * 2**last)
    conv(f"encoder.block.{last + 2}", width * 2**last, latent, 3)
    conv("decoder_2.model.0", latent, decoder, 7)
    for i, stride in enumerate(ratios):
        snake(f"decoder_2.model.{i + 1}.block.0", decoder // 2**i)
        conv(f"decoder_2.model.{i + 1}.block.1", decoder // 2**i, decoder // 2 ** (i + 1), 2 * stride, transposed=True)
        for j in range(3):
            unit(f"decoder_2.model.{i + 1}.block.{j + 2}", decoder // 2 ** (i + 1))
    snake(f"decoder_2.model.{last + 1}", decoder // 2**last)
    conv(f"decoder_2.model.{last + 2}", decoder // 2**last, 1, 7)

    for half in ("encoder", "decoder"):
        for end in ["conv"] if half == "encoder" else ["conv1", "conv2"]:
            out[f"{half}_semantic.{end}.conv.weight"] = [semantic, semantic, 3]
        for i in range(2):
            block = f"{half}_semantic.conv_blocks.{i}"
            out.update({f"{block}.conv.conv.weight": [semantic, semantic, 3], f"{block}.conv.conv.bias": [semantic]})
            for j in range(2):
                out[f"{block}.res_units.{j}.conv1.conv.weight"] = [semantic, semantic, 3]
                out[f"{block}.res_units.{j}.conv2.weight"] = [semantic, semantic, 1]

    both = latent + semantic
    for name, rows, columns in (("fc_prior", both, both), ("fc_post1", semantic, both), ("fc_post2", latent, both)):
        out.update({f"{name}.weight": [rows, columns], f"{name}.bias": [rows]})
    for q in range(stages):
        stage = f"quantizer.vq.layers.{q}"
        out.update({f"{stage}._codebook.{k}": v for k, v in dict(
            inited=[1], cluster_size=[bins], embed=[bins, size], embed_avg=[bins, size]).items()})
        out.update({f"{stage}.project_in.weight": [size, both], f"{stage}.project_in.bias": [size],
                    f"{stage}.project_out.weight": [both, size], f"{stage}.project_out.bias": [both]})

    hubert = {"masked_spec_embed": [semantic], "feature_extractor.conv_layers.0.layer_norm.weight": [extractor],
              "feature_extractor.conv_layers.0.layer_norm.bias": [extractor]}
    for i, kernel in enumerate([10, 3, 3, 3, 3, 2, 2]):
        hubert[f"feature_extractor.conv_layers.{i}.conv.weight"] = [extractor, extractor if i else 1, kernel]
    hubert.update({"feature_projection.layer_norm.weight": [extractor], "feature_projection.layer_norm.bias": [extractor],
                   "feature_projection.projection.weight": [semantic, extractor], "feature_projection.projection.bias": [semantic],
                   "encoder.pos_conv_embed.conv.bias": [semantic],
                   "encoder.pos_conv_embed.conv.parametrizations.weight.original0": [1, 1, position],
                   "encoder.pos_conv_embed.conv.parametrizations.weight.original1": [semantic, group, position],
                   "encoder.layer_norm.weight": [semantic], "encoder.layer_norm.bias": [semantic]})
    for i in range(layers):
        linear = {f"attention.{p}_proj": [semantic, semantic] for p in ("q", "k", "v", "out")}
        linear |= {"feed_forward.intermediate_dense": [inner, semantic], "feed_forward.output_dense": [semantic, inner]}
        for name, shape in linear.items():
            hubert.update({f"encoder.layers.{i}.{name}.weight": shape, f"encoder.layers.{i}.{name}.bias": shape[:1]})
        for name in ("layer_norm", "final_layer_norm"):
            hubert.update({f"encoder.layers.{i}.{name}.{k}": [semantic] for k in ("weight", "bias")})
    return {**out, **{f"semantic_model.{k}": v for k, v in hubert.items()}}


def weights(**sizes):
    """Those of the script that made the golden tensors: calmer than the plain rule, see there."""
    calm = {"bias": lambda v: v - 1, "weight_g": lambda v: 0.7 * v}
    return {k: calm.get(k.rsplit(".")[-1], lambda v: v)(v) for k, v in tiny.fill(shapes(**{**SMALL, **sizes})).items()}


def stored(tensors):
    return {k: checkpoint.Stored(v.shape, v.dtype, lambda v=v: v) for k, v in tensors.items()}


def transformers_names(tensors):
    """The same checkpoint as transformers publishes it: weight norm multiplied out except in HuBERT, masked_spec_embed gone."""
    kept = {k: v for k, v in tensors.items() if "parametrizations" in k}
    folded = {k: v.load() for k, v in checkpoint.fold_weight_norm(stored({k: v for k, v in tensors.items() if k not in kept})).items()}
    return {higgs_codec.rename(k): v for k, v in {**folded, **kept}.items() if not k.endswith("masked_spec_embed")}


def config(ratios, original=True, **more):
    if original:
        return dict(n_filters=32, ratios=ratios, sample_rate=24000, semantic_techer="hubert_base_general", **more)
    return dict(model_type="higgs_audio_v2_tokenizer", sample_rate=24000, semantic_sample_rate=16000, block_dilations=[1, 1],
                acoustic_model_config={"downsampling_ratios": ratios, "upsampling_ratios": ratios}, **more)


def folder(path, original=True, settings=None, **sizes):
    path.mkdir(exist_ok=True)
    tensors = weights(**sizes)
    if original:
        torch.save(tensors, path / "model.pth")
    else:
        save_file(transformers_names(tensors), path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(settings if settings is not None else config(sizes.get("ratios", SMALL["ratios"]), original)))
    return path


def rounded_convolutions(part, model, run, monkeypatch):
    """Names of the convolutions that run() executes outside `exact`, where a GPU would round them to ten bits, and inside."""
    depth, seen = [], {True: [], False: []}

    @contextlib.contextmanager
    def noted(device):
        depth.append(device)
        yield
        depth.pop()

    monkeypatch.setattr(part, "exact", noted)
    hooks = [m.register_forward_pre_hook(lambda m, x, name=name: seen[bool(depth)].append(name)) for name, m in model.named_modules()
             if isinstance(m, (torch.nn.Conv1d, torch.nn.ConvTranspose1d))]
    run()
    for hook in hooks:
        hook.remove()
    return seen[False], seen[True]


@pytest.fixture(scope="module")
def codec(tmp_path_factory):
    return higgs_codec.load(folder(tmp_path_factory.mktemp("higgs") / "original"))


# ------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("n", LENGTHS)
def test_codes_and_sound_are_those_of_the_original(codec, n):
    features, frames = codec.features([WAVE[:n]])
    torch.testing.assert_close(features[0], GOLDEN[f"features.{n}"], rtol=1e-4, atol=1e-4)
    assert frames == (n // 960 + (n % 960 >= 119),)
    clear = GOLDEN[f"gap.{n}"].amin(0) > 1e-3  # frames in which no stage has two rows that are as good as equally near
    assert clear.sum() >= frames[0] - 1 and torch.equal(codec.encode(WAVE[:n])[:, clear], GOLDEN[f"codes.{n}"][:, clear])
    sound = codec.decode(GOLDEN[f"codes.{n}"])
    assert sound.shape == (960 * frames[0],) and sound.dtype == torch.float32
    torch.testing.assert_close(sound[:2000], GOLDEN[f"sound.{n}"], rtol=1e-4, atol=1e-4)


def test_the_original_at_these_widths_has_as_many_tensors():
    assert len(weights()) == int(GOLDEN["names"])


def test_a_quiet_clip_is_encoded_as_the_original_does(codec):
    """HuBERT's first norm divides by the channel's own deviation, so quiet clips show its eps."""
    torch.testing.assert_close(codec.features([0.003 * WAVE[:2880]])[0][0], GOLDEN["features.quiet"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("heads, eps, quiet", [(2, 1e-5, 1.0), (3, 1e-5, 1e-3), (4, 0.03, 1.0)])
def test_hubert_states_are_those_of_transformers(heads, eps, quiet):
    transformers = pytest.importorskip("transformers")
    reference = tiny.fill_by_name(transformers.HubertModel(transformers.HubertConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=heads, intermediate_size=32, conv_dim=(8,) * 7, layer_norm_eps=eps,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4))).eval()
    names = {f"semantic_model.{k}": v for k, v in reference.state_dict().items()}
    names = {**{k: v for k, v in weights(position=16).items() if "semantic_model" not in k}, **names}
    folded = checkpoint.fold_weight_norm(stored(names))
    told = dict(semantic_model_config=dict(num_attention_heads=heads, layer_norm_eps=eps))
    ours = higgs_codec.build(folded, told, "hubert")
    checkpoint.fill(ours, folded, higgs_codec.rename, higgs_codec.UNUSED)
    x = quiet * torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        states = torch.stack(reference(x, output_hidden_states=True).hidden_states)
        assert len(states) == 4
        mean, frames = ours.semantic_model(x, [5000, 5000], step=2)
    torch.testing.assert_close(mean, states.mean(0)[:, ::2], rtol=1e-4, atol=1e-5)
    assert frames == [mean.shape[1]] * 2


def test_dac_is_that_of_transformers(codec):
    transformers = pytest.importorskip("transformers")
    reference = transformers.DacModel(transformers.DacConfig(
        encoder_hidden_size=4, decoder_hidden_size=64, hidden_size=6, downsampling_ratios=[8, 5, 4, 2, 3], upsampling_ratios=[8, 5, 4, 2, 3]))
    tensors = transformers_names(weights())
    for name, part in (("acoustic_encoder.", reference.encoder), ("acoustic_decoder.", reference.decoder)):
        part.load_state_dict({k.removeprefix(name): v for k, v in tensors.items() if k.startswith(name)})
    for module in reference.decoder.modules():  # as Higgs changed it: output padding for odd strides, no tanh
        if isinstance(module, torch.nn.ConvTranspose1d):
            module.output_padding = (module.stride[0] % 2,)
    reference.decoder.tanh = torch.nn.Identity()
    x = torch.randn(2, 1, 4000, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = reference.encoder(x)
        torch.testing.assert_close(codec.acoustic_encoder(x[:, :, None], [4000, 4000])[:, :, 0], wanted, rtol=1e-4, atol=1e-5)
        latent = 3 * torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1))
        sound = codec.acoustic_decoder(latent[:, :, None])
        torch.testing.assert_close(sound[:, :, 0], reference.decoder(latent), rtol=1e-4, atol=1e-4)
    assert wanted.shape == (2, 6, 4) and sound.shape == (2, 1, 1, 4800) and sound.abs().max() > 1.1


@pytest.mark.parametrize("ratios", [SMALL["ratios"], [8, 5, 4, 3], [8, 5, 4, 4, 3]])
def test_the_whole_tokenizer_of_transformers_gives_the_same_codes(tmp_path, monkeypatch, ratios):
    """With our resampling, which tests/test_audio.py compares with torchaudio's, and with Boson's repair."""
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "torchaudio", SimpleNamespace(functional=audio, __spec__=None))  # all that they take of it
    theirs = importlib.import_module("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer")
    bandwidth = 8.2 * math.ceil(24000 / math.prod(ratios)) * math.log2(32) / 1000  # their way to say 8 codebooks of 32 rows
    settings = config(ratios, original=False, target_bandwidths=[bandwidth], codebook_size=32, codebook_dim=5)
    settings["acoustic_model_config"] |= dict(model_type="dac", encoder_hidden_size=4, decoder_hidden_size=64, hidden_size=6)
    settings["semantic_model_config"] = dict(model_type="hubert", hidden_size=24, num_hidden_layers=3, num_attention_heads=3,
                                             intermediate_size=32, conv_dim=[8] * 7, num_conv_pos_embedding_groups=4)
    reference = theirs.HiggsAudioV2TokenizerModel.from_pretrained(folder(tmp_path / "hf", False, settings, ratios=ratios))
    reference.pad = 160 * reference.config.semantic_downsample_factor  # theirs is half a hop: 480 where 320 is right
    reference.save_pretrained(tmp_path / "saved")
    ours, saved = higgs_codec.load(tmp_path / "hf"), higgs_codec.load(tmp_path / "saved")
    for n in (2 * ours.hop, 2 * ours.hop + ours.hop // 3, 2 * ours.hop + ours.hop * 5 // 6):  # the second is repaired
        wave = torch.cat([WAVE, WAVE.flip(0)])[:n]
        codes = ours.encode(wave)
        assert ours._plan(n)[1] == (reference.pad if n % ours.hop == ours.hop // 3 else 0) and torch.equal(saved.encode(wave), codes)
        with torch.no_grad():
            assert torch.equal(reference.encode(wave[None, None]).audio_codes[0], codes)
            torch.testing.assert_close(reference.decode(codes[None]).audio_values[0, 0], ours.decode(codes), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("naming", LAYOUTS)
def test_the_published_layout_fits_and_every_tensor_of_it_has_a_place(naming):
    real = {k: torch.empty(v, device="meta") for k, v in shapes(**REAL).items()}
    real = real if naming == "original" else transformers_names(real)
    assert (len(real), zlib.crc32(json.dumps(sorted((k, list(v.shape)) for k, v in real.items())).encode())) == LAYOUTS[naming]
    folded = checkpoint.fold_weight_norm(stored(real))
    codec = higgs_codec.build(folded, {}, naming)
    left = checkpoint.fill(codec, folded, higgs_codec.rename, higgs_codec.UNUSED, device="meta")
    assert len(left) == (41 if naming == "original" else 40) and len(folded) - len(left) == len(list(codec.parameters())), left
    assert (codec.hop, codec.step, codec.codebooks, codec.bins, codec.sample_rate, codec.context) == (960, 2, 8, 1024, 24000, (10, 10))
    assert len(codec.semantic_model.encoder.layers) == 12 and codec.semantic_model.encoder.layers[0].attention.heads == 12


def test_both_namings_are_the_same_codec(tmp_path, codec):
    other = higgs_codec.load(folder(tmp_path / "transformers", original=False))
    for (name, a), (_, b) in zip(codec.named_parameters(), other.named_parameters()):
        assert torch.equal(a, b), name
    assert torch.equal(codec.encode(WAVE), other.encode(WAVE))
    assert all(not p.requires_grad and p.dtype == torch.float32 for p in other.parameters()) and not other.training


def test_each_half_of_a_weight_norm_counts():
    tensors = weights()
    pairs = {k: v for k, v in tensors.items() if re.search(r"weight_[gv]$|original[01]$", k)}
    base = {k: v.load() for k, v in checkpoint.fold_weight_norm(stored(pairs)).items()}
    for half in ("weight_g|original0", "weight_v|original1"):
        g = torch.Generator().manual_seed(1)
        noisy = {k: v + torch.randn(v.shape, generator=g) if re.search(half, k) else v for k, v in pairs.items()}
        for name, value in checkpoint.fold_weight_norm(stored(noisy)).items():
            if base[name].numel() > base[name].shape[0] or "weight_g" in half:
                assert (value.load() - base[name]).abs().max() > 1e-3, name
    assert len(base) == len(pairs) // 2


def test_noise_on_any_tensor_changes_features_codes_or_sound(codec):
    codes = torch.randint(0, 32, (8, 2), generator=torch.Generator().manual_seed(0))
    fixed = 3 * torch.randn(1, 40, 30, generator=torch.Generator().manual_seed(2))
    parts = {"quantizer": lambda: codec.quantizer.encode(fixed).float(), "fc2": lambda: codec.decode(codes),
             "acoustic_decoder": lambda: codec.decode(codes)}
    silent = []
    with torch.no_grad():
        for name, p in codec.named_parameters():
            run = parts.get(name.split(".")[0], lambda: codec.features([WAVE[:1920]])[0])
            before, kept = run(), p.data
            p.data = kept + torch.randn(kept.shape, generator=torch.Generator().manual_seed(1))
            if (run() - before).abs().max() < 1e-4:
                silent.append(name)
            p.data = kept
    # A bias of the keys adds the same to all scores of a query, which softmax does not see. The last stage's
    # project_out acts on sound only.
    assert silent == [*(f"semantic_model.encoder.layers.{i}.attention.k_proj.bias" for i in range(3)),
                      "quantizer.quantizers.7.project_out.weight", "quantizer.quantizers.7.project_out.bias"]
    sound = codec.decode(codes)
    for p in codec.quantizer.quantizers[7].project_out.parameters():
        kept, p.data = p.data, p.data + 1
        assert (codec.decode(codes) - sound).abs().max() > 1e-4
        p.data = kept


@pytest.mark.parametrize("sizes", [
    dict(ratios=[2, 3, 4], width=3, latent=5, decoder=16, semantic=12, inner=10, layers=1, extractor=4, group=3, bins=7, size=3, stages=2),
    dict(ratios=[5, 4, 8, 3, 2], width=2, decoder=32, semantic=36, group=12, layers=2, position=15),
])
@pytest.mark.parametrize("original", [True, False])
def test_widths_come_from_the_tensors(tmp_path, sizes, original):
    codec = higgs_codec.load(folder(tmp_path / "c", original, **sizes))
    hop = math.prod(sizes["ratios"])
    assert codec.hop == hop and codec.codebooks == sizes.get("stages", 8)
    if hop == 960:
        codes = codec.encode(WAVE)
        assert codes.shape == (8, 4) and codec.decode(codes).shape == (3840,)
    else:  # HuBERT's frames are longer than the encoder's: the original keeps all of them and cuts the encoder's
        assert codec.encode(WAVE).shape == (2, 8) and codec.decode(torch.zeros(2, 9, dtype=torch.int64)).shape == (9 * hop,)


# ------------------------------------------------------------------------------------------------ properties


def test_clips_of_unequal_length_share_a_batch_exactly(codec):
    clips = [WAVE[:n] * (i + 1) for i, n in enumerate(LENGTHS)]
    together, frames = codec.features(clips)
    for clip, x, t in zip(clips, together, frames):
        torch.testing.assert_close(x[:t], codec.features([clip])[0][0], rtol=0, atol=1e-4)
    for clip, codes in zip(clips, codec.encode_batch(clips)):
        assert torch.equal(codes, codec.encode(clip))


def test_no_convolution_is_rounded_on_a_gpu(codec, monkeypatch):
    outside, inside = rounded_convolutions(higgs_codec, codec, lambda: codec.decode(codec.encode(WAVE)), monkeypatch)
    assert not outside and {n.split(".")[0] for n in inside} == {"acoustic_encoder", "acoustic_decoder", "semantic_model", "encoder_semantic"}


def test_clips_of_equal_length_share_a_batch_exactly(codec):
    clips = [WAVE[:2999], WAVE[500:3499].flip(0), 0.1 * WAVE[700:3699]]
    for clip, codes in zip(clips, codec.encode_batch(clips)):
        assert torch.equal(codes, codec.encode(clip))


@pytest.mark.parametrize("piece", [8, 64, 1000])
def test_pieces_change_nothing(codec, monkeypatch, piece):
    clips = [WAVE[:2999], WAVE]
    x = torch.randn(1, 6, 1, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, sound = codec.features(clips)[0], codec.acoustic_decoder(x)
        monkeypatch.setattr(higgs_codec, "PIECE", piece)
        torch.testing.assert_close(codec.features(clips)[0], whole, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(codec.acoustic_decoder(x), sound, rtol=1e-5, atol=1e-5)


def test_windows_and_streams_decode_to_the_whole(codec, monkeypatch):
    codes = torch.randint(0, 32, (8, 60), generator=torch.Generator().manual_seed(0))
    whole = codec.decode(codes)
    monkeypatch.setattr(higgs_codec, "WINDOW", 7)
    torch.testing.assert_close(codec.decode(codes), whole, rtol=1e-4, atol=1e-5)
    for chunks in ([60], [1] * 60, [25, 0, 3, 32], [5, 55]):
        stream = codec.stream()
        parts = [stream.decode(c) for c in codes.split(chunks, 1)] + [stream.flush()]
        assert [len(p) for p in parts[:1]] == [max(0, chunks[0] - 10) * 960]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-5)
    assert len(codec.stream().flush()) == 0 and codec.decode(codes[:, :0]).shape == (0,)


def test_a_frame_of_sound_depends_on_ten_frames_each_way_and_no_more(codec):
    codes = torch.zeros(8, 41, dtype=torch.int64)
    changed = codes.clone()
    changed[:, 20] = 1
    moved = (codec.decode(codes) - codec.decode(changed)).abs().view(41, 960).amax(1).nonzero()[:, 0]
    assert codec.context == (10, 10) and moved.tolist() == list(range(10, 31))


def test_the_repair_is_known_from_the_length_alone(codec):
    for n in [*range(119, 3 * 960, 7), *(960 * k + r for k in (1, 30) for r in (118, 119, 631, 632))]:
        frames, pad = codec._plan(n)
        assert frames == n // 960 + (n % 960 >= 119) and pad == (320 if 119 <= n % 960 <= 631 else 0)


# ------------------------------------------------------------------------------------------------ errors


def test_what_does_not_fit_is_said(tmp_path, codec):
    with pytest.raises(Invalid, match=r"mono audio \(n,\) of at least 119 samples at 24000 Hz, got \[118\]"):
        codec.encode(WAVE[:118])
    with pytest.raises(Invalid, match=r"got \[1, 3700\]"):
        codec.encode(WAVE[None])
    for bad in (torch.full((8, 3), 32), torch.full((8, 3), -1)):
        with pytest.raises(Invalid, match="must lie in 0 ... 31"):
            codec.decode(bad)
    with pytest.raises(Invalid, match=r"integers \(8, T\)"):
        codec.decode(torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(Invalid, match=r"integers \(8, T\)"):
        codec.stream().decode(torch.zeros(8, 3))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Invalid, match="does not hold model.safetensors or model.pth"):
        higgs_codec.load(tmp_path / "empty")
    with pytest.raises(Invalid, match="says ratios .8, 5, 4, 2., the kernels are those of .8, 5, 4, 2, 3."):
        higgs_codec.load(folder(tmp_path / "ratios", settings=config([8, 5, 4, 2])))
    with pytest.raises(Invalid, match="State num_attention_heads"):
        higgs_codec.load(folder(tmp_path / "heads", semantic=20, group=5))
    stated = config(SMALL["ratios"], semantic_model_config={"num_attention_heads": 5})
    assert higgs_codec.load(folder(tmp_path / "heads", semantic=20, group=5, settings=stated)).semantic_model.encoder.layers[0].attention.heads == 5
    with pytest.raises(Invalid, match="feat_extract_norm is 'layer'"):
        higgs_codec.load(folder(tmp_path / "norm", settings=config(SMALL["ratios"], semantic_model_config={"feat_extract_norm": "layer"})))
    save_file({"layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}, tmp_path / "empty" / "model.safetensors")
    with pytest.raises(Invalid, match="Is this the audio tokenizer"):
        higgs_codec.load(tmp_path / "empty")


def test_missing_and_unexpected_tensors_are_named(tmp_path):
    tensors = weights()
    for change, message in (({"fc_prior.bias": None}, "missing fc.bias"), ({"fc_post3.bias": torch.ones(3)}, "unexpected fc_post3.bias"),
                            ({"fc_post2.bias": torch.ones(3)}, r"fc_post2.bias is \[3\], the model has \[6\]")):
        torch.save({k: v for k, v in {**tensors, **change}.items() if v is not None}, tmp_path / "model.pth")
        with pytest.raises(Invalid, match=message):
            higgs_codec.load(tmp_path)
    torch.save({**tensors, "fc_post3.bias": torch.ones(3)}, tmp_path / "model.pth")
    higgs_codec.load(tmp_path, allow_unused=True)


def test_weights_picks_one_of_two_namings(tmp_path):
    path = folder(folder(tmp_path / "both"), original=False)
    with pytest.raises(Invalid, match="holds both model.safetensors and model.pth; say which"):
        higgs_codec.load(path)
    assert higgs_codec.load(path, weights="model.pth").hop == higgs_codec.load(path / "model.safetensors").hop == 960
