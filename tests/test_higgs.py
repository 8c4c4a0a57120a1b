"""Higgs Audio v2 against transformers on tiny random checkpoints, and the properties that are its own."""
import ctypes
import gc
import importlib.machinery
import importlib.util
import json
import math
import os
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora
import models
from models import higgs
from models.parts import Invalid, adapters, audio, checkpoint, rope
from models.parts.manifests import read_manifest
from tests import conftest, test_higgs_codec, tiny_higgs
from tests.running import ranks, start
from tests.tiny_higgs import ID

LAYOUTS = Path(conftest.ROOT).parent / "shared/layouts"
K, BEGIN, END = 8, 32, 33
ARABIC = "وَمِنْ ثُمَّ قَالُوا أَنَّهُ لا يُوجَدُ إِلا أَنْ نَأْخُذَ سَيَنْسَتِيلْ."


def load(folder, **options):
    return models.load(folder, options=options)


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("higgs")
    return {"original": tiny_higgs.write(root / "o" / "base", "original", shards=2),
            "transformers": tiny_higgs.write(root / "t" / "base", "transformers", shards=2)}


@pytest.fixture(scope="session")
def model(folders):
    return load(folders["original"])


@pytest.fixture(scope="session")
def hf(folders):
    transformers = pytest.importorskip("transformers")
    return transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(folders["transformers"], use_text_head=True).eval()


def noise(n, seed=0):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.1


def codes(T, seed=0, k=K):
    return torch.randint(0, BEGIN, (k, T), generator=torch.Generator().manual_seed(seed), dtype=torch.int16)


def text(words):
    return {"type": "text", "text": words}


def sound(T, seed=0):
    return {"type": "audio", "audio": codes(T, seed)}


GUIDE = {"messages": [
    {"role": "system", "content": [text("You speak in the voice of the reference.")]},
    {"role": "user", "content": [text("حلو لو سميته"), sound(6, 1), text("Please generate speech for: " + ARABIC)]},
    {"role": "assistant", "content": [text(ARABIC), sound(9, 2)]}]}
# What Boson's own package makes of the rows below; golden/make_higgs.py says what each tensor is.
GOLDEN = load_file(Path(__file__).parent / "golden" / "higgs.safetensors")
ROWS = [{"audio": codes(9), "text": "Hello there, the cat"},
        {"audio": codes(5, 1), "text": "in it", "ref_audio": codes(7, 2), "ref_text": "the other"}, GUIDE]


def for_transformers(example):
    """Inputs of HiggsAudioV2ForConditionalGeneration for one example, which knows one placeholder only."""
    ids, is_audio = example["ids"].clone(), example["audio"]
    ids[is_audio] = ID["<|AUDIO_OUT|>"]
    return dict(input_ids=ids[None], attention_mask=torch.ones_like(ids)[None], audio_input_ids=example["codes"][is_audio][None],
                audio_input_ids_mask=torch.ones(1, int(is_audio.sum()), dtype=torch.bool), labels=example["text_labels"][None],
                audio_labels=example["audio_labels"][is_audio][None])


def means(model, example):
    batch, counts = model.collate([example])
    return {k: v / counts[k] for k, v in model(batch).items()}


def mean_losses(model, row=ROWS[0]):
    with torch.no_grad():
        found = means(model, model.encode(row))
    return [float(found[k]) for k in higgs.LAMBDAS]


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.skipif(not LAYOUTS.exists(), reason="the lists of published tensors are not here")
def test_every_published_tensor_has_its_place_at_real_shapes():
    with torch.device("meta"):
        whole = higgs.Higgs(higgs.PUBLISHED)
    assert sum(p.numel() for p in whole.parameters()) == 5_771_283_456
    for naming in higgs.Higgs.namings:
        layout = json.loads((LAYOUTS / f"higgs-v2-3b-{naming}.json").read_text())
        ours = {whole.published_name(n, naming): list(p.shape) for n, p in whole.named_parameters()}
        assert ours == {n: shape for n, (shape, _) in layout.items()}
        shapes = {higgs.renamed(n, naming, back=True): tuple(s) for n, (s, _) in layout.items()}
        assert higgs.read_config({}, shapes, "") == higgs.PUBLISHED
    names = lora.apply_lora_to_model(whole, {"r": 16, "target_modules": ["attn", "mlp", "audio_mlp"]})
    assert len(names) == 10 * 28
    assert sum(p.numel() for n, p in whole.named_parameters() if ".lora_" in n) == 39_452_672


def test_the_two_namings_are_one_model(folders, model):
    other = load(folders["transformers"])
    assert [model.naming, other.naming] == ["original", "transformers"]
    assert all(torch.equal(x, other.state_dict()[n]) for n, x in model.state_dict().items())
    assert other.fingerprint == model.fingerprint and other.codec_key == model.codec_key
    assert torch.equal(other.frequencies, model.frequencies)
    assert all(torch.equal(a, b) for a, b in zip(model.encode(GUIDE).values(), other.encode(GUIDE).values()))


@pytest.mark.parametrize("naming", higgs.Higgs.namings)
def test_published_state_is_the_file(model, naming):
    wanted = tiny_higgs.weights(tiny_higgs.config())
    if naming == "transformers":
        wanted = {tiny_higgs.transformers_name(n): w for n, w in wanted.items()}
    got = model.published_state_dict(naming)
    assert got.keys() == wanted.keys() and all(torch.equal(got[n], w) for n, w in wanted.items())


@pytest.mark.parametrize("source", higgs.Higgs.namings)
@pytest.mark.parametrize("naming", higgs.Higgs.namings)
def test_a_saved_folder_is_whole(folders, source, naming, tmp_path):
    one = load(folders[source])
    one.save(tmp_path / "out", naming)
    again = load(tmp_path / "out")  # without extra: the codec is inside
    assert again.naming == naming and again.fingerprint == one.fingerprint and again.codec_key == one.codec_key
    assert again.marks == one.marks and again.encode_text("the cat") == one.encode_text("the cat")
    assert torch.allclose(again.frequencies, one.frequencies, rtol=1e-6)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    published = tiny_higgs.config(naming)
    changed = {"max_position_embeddings", "bos_token_id", "text_config", "dtype", "torch_dtype", "rope_parameters"}
    assert {k: written[k] for k in published if k not in changed} == {k: v for k, v in published.items() if k not in changed}
    if naming == "original":
        assert written["text_config"]["rope_scaling"] == published["text_config"]["rope_scaling"]
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize("source", higgs.Higgs.namings)
def test_what_is_saved_loads_in_transformers(folders, source, hf, tmp_path):
    transformers = pytest.importorskip("transformers")
    one = load(folders[source])
    one.save(tmp_path / "out", "transformers")
    theirs = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / "out", use_text_head=True).eval()
    inputs = for_transformers(one.encode(GUIDE))
    with torch.no_grad():
        assert float(theirs(**inputs).loss) == pytest.approx(float(hf(**inputs).loss), rel=1e-5)
    assert theirs.config.codebook_size == 34 and theirs.generation_config.eos_token_id == ID["<|eot_id|>"]


def test_split_tables_and_unstated_widths_are_read(model, tmp_path):
    assert load(tiny_higgs.write(tmp_path / "a" / "base", split=True)).fingerprint == model.fingerprint
    bare = load(tiny_higgs.write(tmp_path / "b" / "base", stated=False))
    assert bare.fingerprint == model.fingerprint and bare.config.head_dim == 16 and bare.config.codebook_size == 34
    assert torch.equal(bare.frequencies, model.frequencies)


def test_a_class_default_does_not_decide_the_ids_of_a_codebook(model, tmp_path):
    folder = tiny_higgs.write(tmp_path / "base", "transformers", codebook_size=34)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "codebook_size": 32}))  # as HiggsAudioV2Config() would say 1024
    assert load(folder).config == load(tiny_higgs.write(tmp_path / "again", "transformers")).config
    assert higgs.read_config({"codebook_size": 1024, "audio_stream_eos_id": 1025}, {}, "").codebook_size == 1026
    assert higgs.read_config({"audio_codebook_size": 512}, {}, "").codebook_size == 514  # the original counts codes only


def test_the_text_head_is_not_tied(model):
    assert json.loads((model.files["tokenizer"].parent / "config.json").read_text())["text_config"]["tie_word_embeddings"] is True
    assert not torch.equal(model.embed_tokens.weight, model.audio_decoder_proj.text_lm_head.weight)


def test_scratch_draws_what_the_config_says(folders):
    for folder in folders.values():
        one = models.load(folder, weights="scratch")
        assert one.fingerprint != load(folder).fingerprint
        assert one.state_dict().keys() == load(folder).state_dict().keys()


def test_rope_numbers_are_a_scale(model):
    odd = {"factor": 32.0, "low_freq_factor": 0.125, "high_freq_factor": 0.5, "original_max_position_embeddings": 1024}
    f = rope.llama3_frequencies(128, 500000.0, rope.LLAMA3)
    assert torch.equal(f, rope.llama3_frequencies(128, 500000.0, odd))
    wave = 2 * math.pi * 500000.0 ** (torch.arange(0, 128, 2) / 128)
    assert torch.allclose(f[wave < 2048], (2 * math.pi / wave)[wave < 2048]) and torch.allclose(f[wave > 8192] * 32, (2 * math.pi / wave)[wave > 8192])
    assert ((wave > 2048) & (wave < 8192)).any()


def resident(name):
    """Bytes that /proc/self/status tells under a name."""
    return int(re.search(rf"{name}:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak of a process cannot be set back here")
@pytest.mark.parametrize("naming", higgs.Higgs.namings)
def test_loading_never_holds_a_second_copy(tmp_path, monkeypatch, naming):
    sizes = dict(hidden_size=512, intermediate_size=2048, num_attention_heads=8, head_dim=64)
    monkeypatch.setattr(tiny_higgs, "weights", lambda c: {n: torch.ones(s) for n, s in tiny_higgs.shapes(c).items()})
    folder = tiny_higgs.write(tmp_path / "base", naming, shards=2, **sizes)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would be filled again and not be seen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew with what is held now
    before = resident("VmRSS")
    m = load(folder)
    copy = sum(p.nbytes for p in m.parameters())
    assert copy > 80e6 and 0.8 < (resident("VmHWM") - before) / copy < 1.3


# ------------------------------------------------------------------------------------------------ what does not fit


def test_the_two_folders_are_told_apart(folders, tmp_path):
    codec = folders["original"].parent / tiny_higgs.CODEC
    with pytest.raises(Invalid, match="is the audio tokenizer, not the language model.*extra.codec"):
        load(codec)
    with pytest.raises(Invalid, match="is the language model, not the audio tokenizer"):
        models.load(folders["original"], extra={"codec": folders["original"]})
    alone = tiny_higgs.write(tmp_path / "base", codec="none")
    with pytest.raises(Invalid, match="audio tokenizer.*codec.*bosonai/higgs-audio-v2-tokenizer"):
        load(alone)
    for place in (codec, codec / "model.pth"):
        assert models.load(alone, extra={"codec": place}).codec_key == load(folders["original"]).codec_key


@pytest.mark.parametrize("key, value, words", [
    ("encode_whisper_embed", True, "encode_whisper_embed is True.*Whisper"), ("audio_adapter_type", "stack", "audio_adapter_type is 'stack'"),
    ("audio_embed_avg", True, "mean of a column"), ("use_delay_pattern", False, "without delay"), ("use_rq_transformer", True, "second transformer"),
    ("audio_dual_ffn_layers", [0, 1], "names 2 of 3 layers"), ("audio_stream_eos_id", 99, "must be two of the 34 ids")])
def test_what_no_published_checkpoint_has_is_refused(tmp_path, key, value, words):
    folder = tiny_higgs.write(tmp_path / "base", **{key: value})
    with pytest.raises(Invalid, match=f"config.json.*{words}"):
        load(folder)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    folder = tiny_higgs.write(tmp_path / "base", "transformers")
    tensors = load_file(folder / "model.safetensors")
    save_file({n: w for n, w in tensors.items() if n != "text_lm_head.weight"}, folder / "model.safetensors")
    with pytest.raises(Invalid, match="no text_lm_head.weight.*use_text_head=True"):
        load(folder)
    save_file({**tensors, "model.bridge.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(Invalid, match="unexpected bridge.weight"):
        load(folder)
    save_file({n: w for n, w in tensors.items() if "layers.2" not in n}, folder / "model.safetensors")
    with pytest.raises(Invalid, match="missing layers.2"):
        load(folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}))
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(Invalid, match="has no <|begin_of_text|>"):
        load(folder)
    with pytest.raises(Invalid, match="no weights of Higgs Audio in naming 'original'.*transformers"):
        models.load(folder, weights="original")


# ------------------------------------------------------------------------------------------------ rows


def columns_one_by_one(clip):
    """The delay pattern by its definition, a cell at a time: (columns, labels)."""
    T = clip.shape[1]
    cells, labels = torch.zeros(T + 9, K, dtype=torch.long), torch.full((T + 9, K), -100)
    for k in range(K):
        for t in range(T + 9):
            i = t - k - 1  # frame whose code of book k stands in column t
            cells[t, k] = BEGIN if i < 0 else clip[k, i] if i < T else END
            if 0 <= i <= T:
                labels[t, k] = cells[t, k]
    return cells, labels


def test_a_clip_is_delayed_and_taught_one_end_per_codebook(model):
    for T in (1, 5, 20):
        columns, labels = higgs.delayed(codes(T).long(), model.config)
        wanted = columns_one_by_one(codes(T).long())
        assert torch.equal(columns, wanted[0]) and torch.equal(labels, wanted[1])
        assert (labels == END).sum(0).tolist() == [1] * K and not (labels == BEGIN).any()


def spelled(model, example):
    """The ids of an example as text, with each run of placeholders as one."""
    ids = [i for n, i in enumerate(example["ids"].tolist()) if not (example["audio"][n] and n and example["audio"][n - 1])]
    return model.tokenizer.decode(ids, special=True)


BOT, SYS, USER, ASK = "<|begin_of_text|>", *(f"<|start_header_id|>{r}<|end_header_id|>\n\n" for r in ("system", "user", "assistant"))
IN, OUT, EOT = "<|audio_bos|><|AUDIO|><|audio_eos|>", "<|audio_out_bos|><|AUDIO_OUT|><|audio_eos|>", "<|eot_id|>"


def test_rows_are_written_as_boson_writes_them(folders, model):
    row = {"audio": codes(4), "text": "new", "ref_audio": codes(3, 1), "ref_text": "old"}
    plain = {k: row[k] for k in ("audio", "text")}
    assert spelled(model, model.encode(plain)) == f"{BOT}{SYS}Generate audio following instruction.{EOT}{USER}new{EOT}{ASK}{OUT}{EOT}"
    assert spelled(model, model.encode(row)) == f"{BOT}{USER}old{EOT}{ASK}{OUT}{EOT}{USER}new{EOT}{ASK}{OUT}{EOT}"
    scene = "Generate audio following instruction.\n\n<|scene_desc_start|>\nQuiet."
    m = load(folders["original"], scene="Quiet.")
    assert spelled(m, m.encode(plain)) == f"{BOT}{SYS}{scene}\n<|scene_desc_end|>{EOT}{USER}new{EOT}{ASK}{OUT}{EOT}"
    assert spelled(m, m.encode(row)).startswith(f"{BOT}{SYS}{scene}\n<|scene_desc_end|>{EOT}{USER}old{EOT}{ASK}{OUT}")
    assert m.encode(plain)["ids"].tolist().count(ID["<|scene_desc_start|>"]) == 1
    m = load(folders["original"], scene="Quiet.", reference_in="system")
    assert spelled(m, m.encode(row)) == f"{BOT}{SYS}{scene}\n\nSPEAKER0: {IN}\n<|scene_desc_end|>{EOT}{USER}new{EOT}{ASK}{OUT}{EOT}"
    m = load(folders["original"], reference_in="system")
    assert "<|scene_desc_start|>\nSPEAKER0: <|audio_bos|>" in spelled(m, m.encode(row))
    m = load(folders["original"], reference_in="user", system="Say it.")
    assert spelled(m, m.encode(row)) == f"{BOT}{SYS}Say it.{EOT}{USER}old{IN}new{EOT}{ASK}{OUT}{EOT}"
    assert m.encode_key != model.encode_key and m.codec_key == model.codec_key
    with pytest.raises(Invalid, match="reference_in is 'assistent', expected one of 'assistant', 'user', 'system'"):
        load(folders["original"], reference_in="assistent")


def test_the_guides_rows_are_read_as_they_stand(model):
    example = model.encode(GUIDE)
    words = "You speak in the voice of the reference."
    assert spelled(model, example) == (f"{BOT}{SYS}{words}{EOT}{USER}حلو لو سميته{IN}Please generate speech for: {ARABIC}{EOT}{ASK}{ARABIC}{OUT}{EOT}")
    assert example["audio"].sum() == 6 + 9 + 9 + 9 and example["codes"].shape == (len(example["ids"]), K)
    first, second = (columns_one_by_one(codes(T, s).long()) for T, s in ((6, 1), (9, 2)))
    assert torch.equal(example["codes"][example["audio"]], torch.cat([first[0], second[0]]))
    assert not example["codes"][~example["audio"]].any()
    labels = example["audio_labels"][example["audio"]]
    assert (labels[:15] == -100).all() and torch.equal(labels[15:], second[1])  # the reference is not trained
    assert (example["audio_labels"][~example["audio"]] == -100).all() and (example["text_labels"][example["audio"]] == -100).all()
    trained = example["text_labels"][example["text_labels"] != -100].tolist()
    assert trained == [*model.encode_text(ARABIC), ID["<|audio_out_bos|>"], ID["<|audio_eos|>"], ID["<|eot_id|>"]]
    assert model.length(example) == len(example["ids"])


def test_text_is_text_whatever_it_looks_like(model):
    odd = "Say <|AUDIO|> and <|eot_id|> <SE>now</SE> <|scene_desc_start|>"
    specials = set(ID.values())
    assert not specials & set(model.encode_text(odd))
    example = model.encode({"audio": codes(2), "text": odd})
    assert str(model.encode_text(odd))[1:-1] in str(example["ids"].tolist()) and example["audio"].sum() == 11
    said = model.encode({"messages": [{"role": "system", "content": odd}, {"role": "assistant", "content": [sound(2)]}]})["ids"].tolist()
    assert said.count(ID["<|scene_desc_start|>"]) == 1 and said.count(ID["<|AUDIO|>"]) == said.count(ID["<SE>"]) == 0
    for words in (ARABIC, "שלום עולם", "नमस्ते", "你好，世界", "e\u0301 \u200fRTL\u200e", "👩‍👩‍👧"):
        ids = model.encode_text(words)
        assert model.tokenizer.decode(ids) == words
        assert str(ids)[1:-1] in str(model.encode({"audio": codes(2), "text": words})["ids"].tolist())


def test_ids_are_those_of_the_tokenizers_library(folders, model):
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(folders["original"] / "tokenizer.json"))
    head, tail = f"{BOT}{USER}", f"{EOT}{ASK}<|audio_out_bos|>"
    for words in ("Hello, the cat is in it.", ARABIC, "two  spaces\n\nlines", "12345"):
        ids = model.encode({"audio": codes(1), "text": words, "ref_audio": codes(1), "ref_text": words})["ids"].tolist()
        start = [theirs.encode(part, add_special_tokens=False).ids for part in (head, words, tail)]  # each by itself
        assert ids[: sum(map(len, start))] == sum(start, [])


def test_what_is_trained_is_what_is_marked(model):
    def turn(T, train=None):
        return {"role": "assistant", "content": [sound(T, T)], **({} if train is None else {"train": train})}

    def trained(*turns):
        messages = [m for t in turns for m in ({"role": "user", "content": f"words {len(t['content'])}"}, t)]
        labels = model.encode({"messages": messages})["audio_labels"][:, 0]
        return [int(n) - 1 for n in (labels != -100).sum()[None]]

    assert trained(turn(3), turn(5)) == [5]  # an earlier answer is a prompt
    assert trained(turn(3, True), turn(5)) == [9]  # 3 + 5 and the second end
    assert trained(turn(3, True), turn(5, False)) == [3]
    assert trained(turn(3, False)) == [-1]
    silent = model.encode({"messages": [{"role": "user", "content": "x"}, turn(3, False)]})
    assert model.length(silent) == 0 and (silent["text_labels"] == -100).all()
    batch, counts = model.collate([silent])
    assert counts["loss/text"] == counts["loss/audio"] == 0 and float(model(batch)["loss/audio"]) == 0
    two = model.encode({"messages": [{"role": "assistant", "content": [sound(2)]}, {"role": "assistant", "content": "bye"}]})
    assert ID["<|eom_id|>"] in two["ids"].tolist()


def test_turns_are_texts_and_answers(model):
    turns = [{"speaker": who, "text": f"turn {i}", "audio": codes(3 + i, i), "train": i != 1} for i, who in enumerate(["ann", "bob", "ann"])]
    example = model.encode({"turns": turns})
    shown = spelled(model, example)
    assert all(f"{USER}[SPEAKER{who}] turn {i}{EOT}{ASK}{OUT}{EOT}" in shown for i, who in enumerate((0, 1, 0)))
    assert "includes a [SPEAKER*] tag" in shown.split(EOT)[0]
    assert (example["audio_labels"][:, 0] != -100).sum() == 4 + 6
    alone = spelled(model, model.encode({"turns": [dict(t, speaker="ann") for t in turns]}))
    assert "SPEAKER" not in alone and alone.count("<|audio_out_bos|>") == 3
    with pytest.raises(Invalid, match="no turn of this row has audio"):
        model.encode({"turns": [{"text": "x"}]})


@pytest.mark.parametrize("messages, words", [
    ([{"role": "narrator", "content": [sound(2)]}], "message 1 has the role 'narrator', expected assistant, user, system"),
    ([{"role": "user", "content": [sound(2)]}, {"role": "assistant", "content": "x"}], "no assistant message has audio"),
    ([{"role": "assistant", "content": [{"type": "audio"}]}], r"message 1 \(assistant\) has a part of type audio without audio"),
    ([{"role": "assistant", "content": [{"type": "image", "image": 1}]}], "part of type 'image', expected text or audio"),
    ([{"role": "user", "content": "x", "train": True}, {"role": "assistant", "content": [sound(2)]}], "message 1 .* says train"),
    ([{"role": "assistant", "content": []}], "has no content")])
def test_conversations_that_cannot_be_written_are_refused(model, messages, words):
    with pytest.raises(Invalid, match=words):
        model.encode({"messages": messages})


@pytest.mark.parametrize("messages, words", [
    ([{"role": "narrator", "content": "x"}, {"role": "assistant", "content": [{"type": "audio", "audio_url": "a.wav"}]}],
     "line 2: the role 'narrator' beside assistant: expected system, user, assistant"),
    ([{"role": "user", "content": [{"type": "audio", "audio_url": "a.wav"}]}, {"role": "assistant", "content": "x"}], "line 2: no assistant message has audio"),
    ([{"role": "user", "content": [{"type": "audio"}]}, {"role": "assistant", "content": [{"type": "audio", "audio_url": "a.wav"}]}], "line 2: .*audio"),
    ([{"role": "assistant", "content": [{"type": "video", "video": "a.wav"}]}], "line 2: .*type text or audio")])
def test_bad_conversations_are_named_with_their_line(tmp_path, messages, words):
    audio.write(tmp_path / "a.wav", noise(24000), 24000)
    good = {"audio": "a.wav", "text": "x"}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (good, {"messages": messages})))
    with pytest.raises(Invalid, match=f"rows.jsonl {words}"):
        read_manifest(tmp_path / "rows.jsonl")


def test_codes_that_do_not_fit_are_refused(model):
    for clip, words in ((torch.full((K, 3), BEGIN), "expected 0 to 31"), (codes(3, k=9), "codes of 9 codebooks; expected 8"), (codes(3) + 32, "expected 0 to 31"), (codes(3) - 32, "codes from -3"),
                        (codes(0), "no frames")):
        with pytest.raises(Invalid, match=words):
            model.encode({"audio": clip, "text": "x"})
    with pytest.raises(Invalid, match="without its transcript.*reference_in"):
        model.encode({"audio": codes(3), "text": "x", "ref_audio": codes(3)})
    with pytest.raises(Invalid, match="is empty"):
        model.encode({"audio": codes(3), "text": "  "})
    with pytest.raises(Invalid, match="has no audio"):
        model.encode({"text": "x"})


# ------------------------------------------------------------------------------------------------ training


def test_losses_states_and_logits_equal_transformers(model, hf):
    for row in ROWS:
        example = model.encode(row)
        batch, counts = model.collate([example])
        with torch.no_grad():
            want = hf(**for_transformers(example), output_hidden_states=True)
            found, h = means(model, example), model.states(batch)
            logits = model.audio_decoder_proj.audio_lm_head(h[batch["audio_from"]])
        sum_of_codebooks = sum(float(found[f"metric/codebook_{k:02d}"]) for k in range(K))
        assert float(found["loss/text"]) + sum_of_codebooks == pytest.approx(float(want.loss), rel=1e-5)
        assert float(found["loss/audio"]) == pytest.approx(sum_of_codebooks / K, rel=1e-6)
        assert counts["loss/audio"] == int((example["audio_labels"] != -100).sum()) and counts["metric/codebook_03"] * K == counts["loss/audio"]
        torch.testing.assert_close(h[batch["audio_from"]], want.hidden_states[-1][0, batch["audio_to"] - 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(logits, want.logits[0, batch["audio_to"] - 1], rtol=1e-4, atol=1e-4)
        text_logits = model.audio_decoder_proj.text_lm_head(h[batch["text_from"]])
        torch.testing.assert_close(text_logits, hf.text_lm_head(want.hidden_states[-1][0, batch["text_to"] - 1]), rtol=1e-4, atol=1e-4)


def golden(number):
    names = (name for name in GOLDEN if name.startswith(f"{number}."))
    return SimpleNamespace(**{name[2:]: GOLDEN[name] for name in names})


@pytest.mark.parametrize("number", range(3))
def test_rows_and_logits_equal_bosons_own(model, number):
    want, example = golden(number), model.encode(ROWS[number])
    is_audio = example["audio"]
    assert torch.equal(example["ids"], want.ids.long()) and torch.equal(is_audio, want.audio)
    assert torch.equal(example["text_labels"], want.text_labels.long())
    assert torch.equal(example["codes"][is_audio].T, torch.cat([want.heard, want.out], 1).long())
    assert torch.equal(example["audio_labels"][is_audio][want.heard.shape[1] :].T, want.audio_labels.long())
    batch, _ = model.collate([example])
    with torch.no_grad():
        h = model.states(batch)
        texts = model.audio_decoder_proj.text_lm_head(h[batch["text_from"]])
        sounds = model.audio_decoder_proj.audio_lm_head(h[batch["audio_from"]]).view(-1, K, 34)
    torch.testing.assert_close(texts, want.text_logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sounds, want.audio_logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("number", range(2))
def test_greedy_frames_equal_bosons_own(model, number):
    row, columns = ROWS[number], golden(number).spoken.long()
    prompts = [(row["ref_text"], row["ref_audio"], None)] if "ref_audio" in row else []
    got = torch.stack(greedy(model, row["text"], 40, prompts), 1)
    T = columns.shape[1] - K - 1
    want = torch.stack([columns[k, 1 + k : 1 + k + T] for k in range(K)])
    assert T > 2 and model.finish == ["end"] and torch.equal(got, want.clamp(max=BEGIN - 1))


@pytest.mark.parametrize("naming", higgs.Higgs.namings)
def test_gradients_equal_transformers_under_every_naming(folders, hf, naming):
    m = load(folders[naming])
    example = m.encode(GUIDE)
    hf.zero_grad()
    hf(**for_transformers(example)).loss.backward()
    wanted = {n: p.grad for n, p in hf.named_parameters()}
    found = means(m, example)
    (found["loss/text"] + K * found["loss/audio"]).backward()  # transformers sums over the codebooks
    for name, p in m.named_parameters():
        want = wanted.pop(m.published_name(name, "transformers"))
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()), msg=lambda s, n=name: f"{n}: {s}")
    assert not wanted


def test_the_first_code_is_predicted_from_the_beginning_and_the_mark_from_the_frames(model):
    example = model.encode({"audio": codes(3), "text": "x"})
    batch, _ = model.collate([example])
    first = int(example["audio"].nonzero()[0])
    assert (batch["audio_to"] - 1)[0] == first and (example["codes"][first] == BEGIN).all()
    eos = (example["ids"] == ID["<|audio_eos|>"]).nonzero()[-1]
    assert int(eos) in batch["text_to"].tolist() and bool(example["audio"][int(eos) - 1])  # said by the last column
    assert len(example["ids"]) - 1 in batch["text_to"].tolist()
    assert len(batch["place"]) == len(example["ids"]) - 1  # the last position predicts nothing


def test_what_stands_behind_the_last_label_is_not_read(model):
    turns = [{"role": "assistant", "content": [sound(4)], "train": True}, {"role": "user", "content": "long " * 20},
             {"role": "assistant", "content": [sound(9)], "train": False}]
    long, short = model.encode({"messages": turns}), model.encode({"messages": turns[:1]})
    a, b = (model.collate([e])[0] for e in (long, short))
    assert len(a["place"]) == len(b["place"]) and float(model(a)["loss/audio"]) == float(model(b)["loss/audio"])


def test_only_the_feed_forward_of_its_kind_acts_at_a_position(folders):
    m = load(folders["original"])
    example = m.encode({"audio": codes(5), "text": "some words"})
    with torch.no_grad():
        found = m.states(m.collate([example])[0])
        for layer in m.layers:
            for part in (layer.audio_mlp, layer.audio_input_layernorm, layer.audio_post_attention_layernorm):
                for p in part.parameters():
                    p.mul_(1.5)
        moved = m.states(m.collate([example])[0])
    assert not torch.allclose(found, moved)
    text_only = dict(example, audio_labels=torch.full_like(example["audio_labels"], -100), text_labels=example["text_labels"].clone())
    first = int(example["audio"].nonzero()[0])
    text_only["text_labels"][:first] = example["ids"][:first]
    text_only["text_labels"][first:] = -100
    with torch.no_grad():  # positions before the first column, <|audio_out_bos|> too, know nothing of the audio path
        a, b = load(folders["original"]).states(m.collate([text_only])[0]), m.states(m.collate([text_only])[0])
    assert torch.equal(a, b)


def test_references_count_in_the_state_and_never_in_the_loss(model):
    row = {"audio": codes(4), "text": "new", "ref_audio": codes(3, 1), "ref_text": "old"}
    other = dict(row, ref_audio=codes(3, 9))
    a, b = (model.collate([model.encode(r)]) for r in (row, other))
    assert a[1] == b[1] and float(model(a[0])["loss/audio"]) != float(model(b[0])["loss/audio"])
    assert a[1]["loss/audio"] == 5 * K


def test_half_precision_runs_and_stays_close(folders, model):
    m = models.load(folders["transformers"], dtype=torch.bfloat16)
    assert m.codec.fc.weight.dtype == torch.float32 and m.dtype == torch.bfloat16
    assert mean_losses(m) == pytest.approx(mean_losses(model), rel=0.05)
    assert len(list(m.frames("Hello", seed=1, min_len=3, max_len=4))) == 4
    lora.apply_lora_to_model(m, {"r": 2, "train_embeddings": True})  # float32 beside bfloat16
    assert mean_losses(m) == pytest.approx(mean_losses(model), rel=0.05)


def test_recomputing_activations_changes_nothing(folders):
    grads, calls = [], []
    for on in (False, True):
        m = load(folders["transformers"]).train()
        m.set_recompute(on)
        m.layers[0].mlp.register_forward_hook(lambda *_: calls.append(on))
        sum(means(m, m.encode(GUIDE))[k] for k in higgs.LAMBDAS).backward()
        grads.append({n: p.grad for n, p in m.named_parameters()})
    assert calls.count(True) == 2 * calls.count(False)
    assert all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())


# ------------------------------------------------------------------------------------------------ the codec


def transformers_codec(folder, monkeypatch):
    """A tiny audio tokenizer that transformers can load, written to a folder."""
    transformers = pytest.importorskip("transformers")
    sizes = test_higgs_codec.SMALL
    if importlib.util.find_spec("torchaudio") is None:  # which transformers asks for nothing but its resampling
        stand_in = ModuleType("torchaudio")
        stand_in.functional = SimpleNamespace(resample=audio.resample)
        stand_in.__spec__, stand_in.__version__ = importlib.machinery.ModuleSpec("torchaudio", None), "2.13.0"
        monkeypatch.setitem(sys.modules, "torchaudio", stand_in)
        monkeypatch.setitem(transformers.utils.import_utils.BACKENDS_MAPPING, "torchaudio", (lambda: True, ""))
    settings = dict(model_type="higgs_audio_v2_tokenizer", sample_rate=24000, codebook_size=sizes["bins"], codebook_dim=sizes["size"],
                    target_bandwidths=[1], acoustic_model_config=dict(
                        model_type="dac", encoder_hidden_size=sizes["width"], decoder_hidden_size=sizes["decoder"], hidden_size=sizes["latent"],
                        downsampling_ratios=sizes["ratios"], upsampling_ratios=sizes["ratios"], codebook_size=sizes["bins"]),
                    semantic_model_config=dict(
                        model_type="hubert", hidden_size=sizes["semantic"], intermediate_size=sizes["inner"], num_hidden_layers=sizes["layers"],
                        num_attention_heads=12, conv_dim=[sizes["extractor"]] * 7, num_conv_pos_embedding_groups=sizes["semantic"] // sizes["group"],
                        num_conv_pos_embeddings=sizes["position"]))
    part = importlib.import_module("transformers.models.higgs_audio_v2_tokenizer.modeling_higgs_audio_v2_tokenizer")
    monkeypatch.setattr(transformers, "HiggsAudioV2TokenizerModel", part.HiggsAudioV2TokenizerModel, raising=False)  # None if asked for before
    return tiny_higgs.write_codec(folder, "transformers", settings=settings)


def test_codes_and_sound_equal_transformers(tmp_path, monkeypatch):
    """Clips whose two branches agree in length; for the others transformers pads otherwise than the model was trained with."""
    folder = transformers_codec(tmp_path / "codec", monkeypatch)
    theirs, ours = sys.modules["transformers"].HiggsAudioV2TokenizerModel.from_pretrained(folder).eval(), higgs.higgs_codec.load(folder)
    for n in (960 * 4, 960 * 5 + 100, 960 * 7 + 700):
        wave = noise(n, n)
        with torch.no_grad():
            want = theirs.encode(wave[None, None]).audio_codes[0]
            assert torch.equal(ours.encode(wave), want)
            torch.testing.assert_close(ours.decode(want), theirs.decode(want[None]).audio_values[0, 0], rtol=1e-4, atol=1e-4)


def test_transformers_processor_makes_our_rows_and_hears_our_columns(folders, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)  # where the id of the audio tokenizer on the hub is a folder
    (tmp_path / higgs.PARTS["codec"]).parent.mkdir()
    codec = transformers_codec(tmp_path / higgs.PARTS["codec"], monkeypatch)
    one = models.load(folders["original"], extra={"codec": codec})
    one.save(tmp_path / "out", "transformers")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    heard, said = noise(960 * 4), noise(960 * 5, 1)
    row = {"messages": [{"role": "system", "content": "Say it."},
                        {"role": "user", "content": [text("it is"), {"type": "audio", "audio": heard}, text(ARABIC)]},
                        {"role": "assistant", "content": [{"type": "audio", "audio": said}]}]}
    example = one.encode(row)
    told = [dict(m, content=[text(m["content"])] if isinstance(m["content"], str) else m["content"]) for m in row["messages"]]
    words = processor.apply_chat_template(told, tokenize=False)
    theirs = processor(text=words, audio=[heard.numpy(), said.numpy()], return_tensors="pt", add_special_tokens=False)
    want = for_transformers(example)
    delayed = theirs["input_ids"][0] == ID[higgs.DELAY]  # it marks the last seven columns of a clip
    assert int(delayed.sum()) == 2 * 7 and torch.equal(theirs["input_ids"][0].where(~delayed, ID["<|AUDIO_OUT|>"]), want["input_ids"][0])
    assert torch.equal(theirs["audio_input_ids"], want["audio_input_ids"])
    asked = processor.apply_chat_template(told[:2], tokenize=False, add_generation_prompt=True)
    assert words.startswith(asked)
    columns = higgs.delayed(one.encode_audio(said).long(), one.config)[0]
    sound = processor.batch_decode(columns[None])[0]
    torch.testing.assert_close(sound, one.codec.decode(one.encode_audio(said).long()), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------ speaking


CONTEXT = [("the other cat", codes(6, 3), None)]


def greedy(model, words, n, prompts=(), **more):
    return list(model.frames(words, prompts=prompts, temperature=0, max_len=n, **more))


@pytest.mark.parametrize("words, prompts", [("Hello in the cat", CONTEXT), ("a", ()), ("What is it?", ())])
def test_greedy_frames_equal_transformers(model, hf, words, prompts):
    request = model._request(higgs.Sampling(), higgs.Wanted(words, prompts))
    prompt = model._prompt({"request": request, "text": words, "seed": 0}, higgs.Sampling()).example
    inputs = for_transformers({k: v[:-1] for k, v in prompt.items()})  # without the first column, which transformers makes itself
    inputs = {k: v for k, v in inputs.items() if "labels" not in k and (prompts or not k.startswith("audio_"))}
    with torch.no_grad():
        columns = hf.generate(**inputs, do_sample=False, max_new_tokens=49)[0]
    columns = columns[(columns == BEGIN).all(1).nonzero()[-1, 0] :]
    want = torch.stack([columns[1 + k : len(columns) - K + 1 + k, k] for k in range(K)], 1)
    got = torch.stack(greedy(model, words, 40, prompts))
    assert len(got) > 3 and torch.equal(got, want[: len(got)].clamp(max=31))
    if model.finish == ["end"]:  # transformers' ending is always a whole one, with a row of ends at last
        newest = int((columns == END).any(1).nonzero()[0])
        assert len(got) == newest - 1 - int((columns[newest] == END).nonzero()[0]) and len(want) == newest + 1


def forced(model, monkeypatch, table):
    """Let the audio head say `table(column number)` (K,) instead of what it learnt."""
    def logits(speech, h, u):
        chosen = torch.stack([torch.as_tensor(table(int(n))) for n in speech.number[:, 0]])
        return torch.where(speech.order < speech.number, chosen, BEGIN)

    monkeypatch.setattr(higgs.Speech, "_column", logits)


@pytest.mark.parametrize("book", range(K))
def test_the_ending_is_upstreams(model, monkeypatch, book):
    """Boson's loop: the first end, of codebook k in column e, leaves e - 1 - k frames."""
    e = 12
    forced(model, monkeypatch, lambda n: [END if n == e and k == book else (n + k) % 30 for k in range(K)])
    frames = list(model.frames("x", seed=0))
    assert model.finish == ["end"] and len(frames) == e - 1 - book
    assert all(frame.tolist() == [(t + 1 + 2 * k) % 30 for k in range(K)] for t, frame in enumerate(frames))
    assert len(list(model.frames("x", seed=0, max_len=3))) == 3 and model.finish == ["cap" if e - 1 - book > 3 else "end"]


def test_the_ending_climbs_a_codebook_per_column(model):
    class Stub:
        K, order, left = K, torch.arange(K), torch.full((3, 1), K)

    speech = Stub()
    speech.model = model
    column = torch.full((3, K), 5)
    column[0, 0] = column[1, 3] = column[1, 5] = END
    told, speech.left = higgs.Speech._ending(speech, column)
    assert speech.left[:, 0].tolist() == [7, 4, 8] and told[1].tolist() == [END] * 4 + [5, END, 5, 5] and torch.equal(told[2], column[2])
    plain = torch.full((3, K), 5)
    rows = []
    for _ in range(7):
        told, speech.left = higgs.Speech._ending(speech, plain)
        rows.append((told[0] == END).int().tolist())
    assert rows == [[1] * n + [0] * (K - n) for n in range(1, 8)]  # codebook 7 never gets one


def test_an_end_at_once_is_silence_and_no_error(model, monkeypatch):
    forced(model, monkeypatch, lambda n: [END] * K)
    assert list(model.frames("x", seed=0)) == [] and model.finish == ["end"]
    with pytest.warns(UserWarning, match="only silence"):
        wave = torch.cat(list(model.generate("x", seed=0)))
    assert len(wave) == 960 and not wave.any()
    seeds, run = [], higgs.Higgs._run
    monkeypatch.setattr(higgs.Higgs, "_run", lambda self, p, s: seeds.append(p[0]["seed"]) or run(self, p, s))
    assert list(model.frames("x", seed=4, retries=2)) == [] and seeds == [4, 5, 6]


def test_the_cap_gives_a_prefix_and_the_length_of_the_text_sets_another(model):
    long = torch.stack(list(model.frames("Hello", seed=1, min_len=300, max_len=300)))
    assert len(long) == 300 and model.finish == ["cap"]
    for n in (1, 7, 8, 9, 150):
        assert torch.equal(torch.stack(list(model.frames("Hello", seed=1, min_len=300, max_len=n))), long[:n])
    prompt = model._prompt({"request": model._request(higgs.Sampling(), higgs.Wanted("Hello")), "text": "Hello", "seed": 1}, higgs.Sampling())
    assert prompt.frames == 250 + 25 * len(model.encode_text("Hello"))
    with torch.no_grad():
        kept = model.audio_decoder_proj.audio_lm_head.weight.clone()
        rows = torch.arange(K) * 34 + END
        model.audio_decoder_proj.audio_lm_head.weight[rows] = -model.norm.weight  # hardly ever an end
    assert all(len(list(model.frames("Hello", seed=s, min_len=20, max_len=40))) >= 20 for s in range(3))
    model.audio_decoder_proj.audio_lm_head.weight.data = kept


def test_cached_and_uncached_generation_agree(model, monkeypatch):
    """The training forward on what was generated predicts it: every code by the argmax of its own column."""
    monkeypatch.setattr(higgs, "pick", lambda logits, u, s: logits[..., :BEGIN].argmax(-1))
    got = torch.stack(greedy(model, "Hello", 20, CONTEXT, min_len=20))
    row = {"audio": got.T.short(), "text": "Hello", "ref_audio": CONTEXT[0][1], "ref_text": CONTEXT[0][0]}
    batch, _ = model.collate([model.encode(row)])
    with torch.no_grad():
        logits = model.audio_decoder_proj.audio_lm_head(model.states(batch)[batch["audio_from"]]).view(-1, K, 34)[:, :, :BEGIN]
    labels = batch["audio_labels"].flatten(0, 1)[batch["audio_to"]]
    inner = labels != -100
    inner[20:] = False  # from there on the row shows ends, where the speech went on
    assert torch.equal(logits.argmax(-1)[inner], labels[inner]) and int(inner.sum()) == sum(range(13, 21))


def test_rows_of_a_batch_equal_single_runs(model):
    requests = [dict(text="Hello in the cat", prompts=CONTEXT, seed=5), dict(text="x", seed=6), dict(text="it is", seed=7)]
    for more in (dict(max_len=9, min_len=9), dict(max_len=12), dict(max_len=12, force_audio=False, temperature=1.0)):
        single = [list(model.frames(**r, **more)) for r in requests]
        s = higgs.Sampling(**more)
        together = [[], [], []]
        for i, frame in model._takes([model._request(s, higgs.Wanted(**r)) for r in requests], s):
            together[i].append(frame)
        assert [[f.tolist() for f in a] for a in single] == [[f.tolist() for f in b] for b in together]


def test_nothing_waits_for_the_device_between_frames(model, monkeypatch):
    frames = model.frames("Hello", seed=1, max_len=20, min_len=20)
    next(frames)  # the prompt is read

    def forbidden(*_):
        raise AssertionError("the host waits for the device")

    for name in ("item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name, forbidden)
    rest = list(frames)
    monkeypatch.undo()
    assert len(rest) == 19


def test_an_audio_step_runs_the_feed_forward_of_audio_only(folders):
    m = load(folders["original"])
    want = list(m.frames("Hello", seed=1, max_len=6, min_len=6))
    frames = m.frames("Hello", seed=1, max_len=6, min_len=6)
    first = next(frames)
    for layer in m.layers:  # what acts on text is gone once the prompt is read
        del layer.mlp, layer.input_layernorm, layer.post_attention_layernorm
    assert all(torch.equal(a, b) for a, b in zip([first, *frames], want))


@pytest.mark.parametrize("rows, adapted", [(1, False), (3, False), (3, True)])
def test_the_steps_compute_what_the_layers_do(folders, rows, adapted):
    m = load(folders["original"])
    if adapted:
        lora.apply_lora_to_model(m, {"r": 2})
        randomize(m)
    s = higgs.Sampling(max_len=9)
    pieces = [{"request": m._request(s, higgs.Wanted(w)), "text": w, "seed": 1} for w in ("Hello in the cat", "a", "it is")[:rows]]
    prompts = [m._prompt(piece, s) for piece in pieces]
    speeches = [higgs.Speech(m, prompts, s) for _ in range(2)]
    for speech in speeches:
        speech.read(prompts)
    with torch.inference_mode():
        for n in range(4):
            a, b = speeches
            if rows == 3 and n == 2:  # the second answer is done
                for speech in speeches:
                    speech.keep([0, 2])
            x = m._columns(torch.full((len(a.generators), K), n + 3))
            place = b.batch.step(n)
            context = higgs.Context(higgs.rotary(place.positions, m.frequencies), mask=place.mask, column=place.column)
            want = m._transform(x[:, None], context, 0, b.caches)[:, 0]
            torch.testing.assert_close(a.steps(x, *a.batch.next(n), a.caches), want, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(a.caches[2].k, b.caches[2].k, rtol=1e-5, atol=1e-5)


def test_sampling_follows_the_distribution():
    logits = torch.tensor([2.0, 1.5, 0.0, -1.0, 1.0]).repeat(20000, 1)
    u = 1 - torch.rand(20000, generator=torch.Generator().manual_seed(0))

    def shares(**settings):
        return torch.bincount(higgs.pick(logits, u, higgs.Sampling(**settings)), minlength=5) / 20000

    p = torch.tensor([2.0, 1.5, -math.inf, -math.inf, 1.0]).div(0.7).softmax(0)
    torch.testing.assert_close(shares(temperature=0.7, top_k=3, top_p=1.0), p, rtol=0, atol=0.01)
    full = logits[0].softmax(0)
    torch.testing.assert_close(shares(temperature=1.0, top_k=0, top_p=1.0), full, rtol=0, atol=0.01)
    nucleus = torch.where(torch.tensor([True, True, False, False, False]), full, 0)  # 0.45 + 0.27 > 0.6 > 0.45
    torch.testing.assert_close(shares(temperature=1.0, top_k=0, top_p=0.6), nucleus / nucleus.sum(), rtol=0, atol=0.01)
    assert shares(temperature=1.0, top_p=1e-6)[0] == 1
    torch.testing.assert_close(torch.bincount(higgs.pick_any(logits, u), minlength=5) / 20000, full, rtol=0, atol=0.01)
    assert higgs.pick(torch.tensor([[-math.inf, 1.0]]), torch.tensor([2.0**-24]), higgs.Sampling()).tolist() == [1]


def test_a_draw_is_never_zero(model, monkeypatch):
    """The generator may give 0, which would pick an id that was left out."""
    one, other = (torch.stack(list(model.frames("x", seed=seed, max_len=6, min_len=6, temperature=1.0))) for seed in (1, 2))
    assert not torch.equal(one, other)
    seen, column = [], higgs.Speech._column
    monkeypatch.setattr(torch, "rand", lambda *size, generator: torch.zeros(size))
    monkeypatch.setattr(higgs.Speech, "_column", lambda self, h, u: seen.append(u) or column(self, h, u))
    list(model.frames("x", seed=0, max_len=2, min_len=2))
    assert seen and all((u == 1).all() for u in seen)


def test_top_k_and_top_p_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    assert transformers
    logits = torch.randn(40, 66, generator=torch.Generator().manual_seed(0)) * 3
    for temperature, k, p in ((0.3, 50, 0.95), (1.0, 5, 0.5), (2.0, 66, 0.3)):
        left = logits / temperature
        left = TopPLogitsWarper(p)(None, TopKLogitsWarper(k)(None, TemperatureLogitsWarper(temperature)(None, logits))) > -math.inf
        found = torch.zeros_like(left)
        for u in torch.linspace(1e-6, 1, 3000):
            found[torch.arange(40), higgs.pick(logits, u.expand(40), higgs.Sampling(temperature=temperature, top_k=k, top_p=p))] = True
        assert not (found & ~left).any() and (found == left).float().mean() > 0.98  # the grid may miss a small one


def test_repeated_codes_are_drawn_anew(model, monkeypatch):
    seen = []
    monkeypatch.setattr(higgs, "pick_any", lambda logits, u: seen.append(logits) or torch.full(logits.shape[:-1], 9))
    monkeypatch.setattr(higgs, "pick", lambda logits, u, s: torch.full(logits.shape[:-1], 4))
    got = torch.stack(list(model.frames("x", seed=1, max_len=12, min_len=12, ras_win_len=3, ras_max_repeat=2)))
    assert got[:, 0].tolist() == [4, 4, 9, 4, 9, 4, 4, 9, 4, 9, 4, 4] or got[:, 0].tolist()[:3] == [4, 4, 9]
    assert got[:, 5].tolist()[:3] == [4, 4, 9]  # the columns that begin a stream do not count
    assert all(torch.isinf(x[..., END]).any() for x in seen[:3])  # the end is kept away there, too
    plain = torch.stack(list(model.frames("x", seed=1, max_len=12, min_len=12, ras_win_len=None)))
    assert (plain == 4).all()


def test_repetition_is_looked_at_unless_greedy():
    assert (higgs.Sampling().ras_win_len, higgs.Sampling().ras_max_repeat) == (7, 2)
    assert higgs.Sampling(temperature=0).ras_win_len is None
    assert higgs.Sampling(temperature=0, ras_max_repeat=3).ras_win_len == 7
    assert higgs.Sampling(ras_win_len=None).ras_win_len is None
    with pytest.raises(Invalid, match="ras_win_len is 0, expected at least 1"):
        higgs.Sampling(ras_win_len=0)
    with pytest.raises(Invalid, match="top_p is 0"):
        higgs.Sampling(top_p=0)


def test_stream_ids_never_count_as_repeated(model, monkeypatch):
    """Seven columns of B come before codebook 7 begins, and none of them is a repetition."""
    asked = []
    column = higgs.Speech._column
    monkeypatch.setattr(higgs.Speech, "_column", lambda self, h, u: asked.append(self.recent.clone()) or column(self, h, u))
    list(model.frames("x", seed=1, max_len=12, min_len=12))
    assert (asked[5] == -1).any() and not (torch.stack(asked) >= BEGIN).any()
    assert (asked[7][0, :, 7] == -1).all()


SAMPLE = higgs.Speech.sample


def scripted(model, monkeypatch, letters):
    """Let the text head say `letters`, one after the other."""
    said = iter(letters)


    def spoken(speech, h, n, writing):
        out = SAMPLE(speech, h, n, writing).clone()
        if writing:
            out[:, -1] = next(said)
        return out

    monkeypatch.setattr(higgs.Speech, "sample", spoken)


def test_the_text_head_may_choose_when_it_speaks(model, monkeypatch):
    end, begin = ID["<|eot_id|>"], ID["<|audio_out_bos|>"]
    scripted(model, monkeypatch, [end])
    assert list(model.frames("x", seed=0, force_audio=False)) == [] and model.finish == ["end"]
    monkeypatch.undo()
    forced(model, monkeypatch, lambda n: [END if n == 6 else n] + [n] * (K - 1))
    scripted(model, monkeypatch, [5, 6, begin, 7, begin, end])
    frames = torch.stack(list(model.frames("x", seed=0, force_audio=False)))
    assert len(frames) == 10 and torch.equal(frames[:5], frames[5:]) and frames[:, 0].tolist() == [1, 2, 3, 4, 5] * 2
    assert model.finish == ["end"]
    scripted(model, monkeypatch, [begin, begin, begin])
    assert len(list(model.frames("x", seed=0, force_audio=False, max_len=7))) == 7 and model.finish == ["cap"]
    scripted(model, monkeypatch, [5] * 200)
    assert list(model.frames("x", seed=0, force_audio=False)) == [] and model.finish == ["cap"]


def test_what_is_written_before_is_read(model, monkeypatch):
    """Frames after a written text are those that follow when the same text stands in the prompt."""
    begin = ID["<|audio_out_bos|>"]
    letters = model.encode_text("it is")
    scripted(model, monkeypatch, [*letters, begin])
    got = greedy(model, "Hello", 12, force_audio=False, min_len=12)
    monkeypatch.undo()
    s = higgs.Sampling(temperature=0, min_len=12, max_len=12)
    request = model._request(s, higgs.Wanted("Hello"))
    open_ = higgs.Higgs._open

    def with_words(self, draft, forced_):
        draft.write([*self._header("assistant"), *letters, begin])
        draft.speak(ID["<|AUDIO_OUT|>"], torch.full((1, K), BEGIN))

    monkeypatch.setattr(higgs.Higgs, "_open", with_words)
    want = [f for _, f in model._takes([request], s)]
    assert open_ and torch.equal(torch.stack(got), torch.stack(want))


def test_long_texts_are_spoken_in_pieces_with_context(model, monkeypatch):
    assert higgs.cut("one two three. four five. six", 3) == ["one two three.", "four five. six"]
    assert higgs.cut("one two three four five", 2) == ["one two", "three four", "five"]
    assert higgs.cut("你好世界。再见", 4) == ["你好世界。", "再见"] and higgs.cut("a b c", 0) == ["a b c"]
    assert " ".join(higgs.cut(f"{ARABIC} {ARABIC}", 4)).split() == f"{ARABIC} {ARABIC}".split()
    prompts = []
    prompt = higgs.Higgs._prompt
    monkeypatch.setattr(higgs.Higgs, "_prompt", lambda self, piece, s: prompts.append(prompt(self, piece, s)) or prompts[-1])
    said = dict(prompts=CONTEXT, seed=1, piece_words=2, keep_pieces=1, min_len=5)
    frames = list(model.frames("one two. three four. five six.", **said, max_len=400))
    shown = [spelled(model, p.example) for p in prompts]
    assert len(shown) == 3 and all("the other cat" in words for words in shown)
    assert shown[2].count("<|AUDIO_OUT|>") == 3 and "one two." not in shown[2] and "three four." in shown[2] and "five six." in shown[2]
    assert torch.equal(torch.stack(frames[:5]), torch.stack(list(model.frames("one two.", prompts=CONTEXT, seed=1, min_len=5, max_len=5))))
    assert len(list(model.frames("one two. three four.", **said, max_len=7))) == 7


def test_chunks_joined_are_the_whole(model):
    frames = torch.stack(list(model.frames("Hello", prompts=CONTEXT, seed=2, min_len=60, max_len=60)), 1)
    whole = model.codec.decode(frames)
    for limit in (16, 1):
        chunks = list(model.generate("Hello", prompts=CONTEXT, seed=2, min_len=60, max_len=60, chunk_frames=limit))
        assert len(chunks) > 5 and len(chunks[0]) == 960  # as soon as a frame is final
        torch.testing.assert_close(torch.cat(chunks), whole, rtol=0, atol=1e-5)


def test_prompts_are_references(model):
    wave = noise(960 * 4)
    by_wave = list(model.frames("x", prompts=[("the cat", wave, None)], seed=1, max_len=3, min_len=3))
    by_codes = list(model.frames("x", prompts=[("the cat", model.encode_audio(wave), None)], seed=1, max_len=3, min_len=3))
    assert all(torch.equal(a, b) for a, b in zip(by_wave, by_codes))
    alone = [(None, wave, None)]
    for place in ("user", "system"):
        assert len(list(model.frames("x", prompts=alone, seed=1, max_len=3, min_len=3, reference_in=place))) == 3
    two = [("one", codes(3), "ann"), ("two", codes(4), "bob")]
    s = higgs.Sampling()
    shown = spelled(model, model._prompt({"request": model._request(s, higgs.Wanted("new", two, "bob")), "text": "new", "seed": 0}, s).example)
    assert "[SPEAKER0] one" in shown and "[SPEAKER1] two" in shown and "[SPEAKER1] new" in shown
    s = higgs.Sampling(reference_in="system", scene="Quiet.")
    shown = spelled(model, model._prompt({"request": model._request(s, higgs.Wanted("new", two)), "text": "new", "seed": 0}, s).example)
    assert f"Quiet.\n\nSPEAKER0: {IN}\nSPEAKER1: {IN}\n<|scene_desc_end|>" in shown
    shown = spelled(model, model._prompt({"request": model._request(s, higgs.Wanted("new", (), 1)), "text": "new", "seed": 0}, s).example)
    assert f"{USER}[SPEAKER1] new{EOT}" in shown
    for more, words in ((dict(prompts=alone), "without its transcript"), (dict(speaker="ann"), "speaker 'ann'.*numbers of their references"), (dict(noise=torch.zeros(1)), "no noise"),
                        (dict(prompts=two, speaker="carl"), "the prompts have ann, bob"), (dict(prompts=[("t", codes(3, k=5), None)]), "of 5 codebooks"),
                        (dict(prompts=[("t", codes(2100), None)]), "shorter reference"), (dict(reference_in="desk"), "reference_in is 'desk'")):
        with pytest.raises(Invalid, match=words):
            list(model.frames("x", **more))
    with pytest.raises(Invalid, match="is empty"):
        list(model.frames("  "))


# ------------------------------------------------------------------------------------------------ adapters


def randomize(model):
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for m in lora.lora_modules(model).values():
            m.lora_B.copy_(torch.randn(m.lora_B.shape, generator=g) * 0.2)


def test_targets_are_named_by_word_suffix_pattern_and_regex(folders):
    m = load(folders["original"])

    def wrapped(*words):
        return lora.apply_lora_to_model(m, {"r": 2, "target_modules": list(words)})

    default = wrapped()
    assert len(default) == 7 * 3 and all(".self_attn." in n or ".audio_mlp." in n for n in default)
    assert sorted(wrapped("attn", "audio_mlp")) == sorted(default)
    assert len(wrapped("mlp")) == 3 * 3 and len(wrapped("gate_proj")) == 2 * 3
    assert wrapped("audio_mlp.gate_proj") == [f"layers.{i}.audio_mlp.gate_proj" for i in range(3)]
    assert all(".mlp." in n for n in wrapped("mlp.gate_proj"))
    seed = ("*.self_attn.{q,k,v,o}_proj", "*.mlp.{gate,up,down}_proj", "*.audio_mlp.{gate,up,down}_proj")
    assert len(wrapped(*seed)) == 10 * 3 and len(wrapped(seed[1])) == 9
    with pytest.raises(Invalid, match="matches no Linear"):
        wrapped("*.audio_mlp.{gat,u}_proj")
    with pytest.raises(Invalid, match="enable_dit.*target_modules"):
        lora.apply_lora_to_model(m, {"r": 2, "enable_dit": True})


@pytest.mark.parametrize("naming", higgs.Higgs.namings)
def test_an_adapter_trained_here_acts_in_peft(folders, model, hf, tmp_path, naming):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    m = load(folders[naming])
    lora.apply_lora_to_model(m, {"r": 2, "alpha": 4, "target_modules": ["attn", "audio_mlp"]})
    randomize(m)
    lora.save_lora_weights(m, tmp_path / "own")
    lora.save_lora_weights(m, tmp_path / "there", naming="transformers")
    names = set(load_file(tmp_path / "own" / "adapter_model.safetensors"))
    head = "base_model.model." + ("model." if naming == "transformers" else "") + "layers.0."
    assert any(n.startswith(head) for n in names)
    config = json.loads((tmp_path / "there" / "adapter_config.json").read_text())
    assert config["task_type"] is None and config["modules_to_save"] is None
    theirs = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(folders["transformers"], use_text_head=True).eval()
    wrapped = peft.PeftModel.from_pretrained(theirs, tmp_path / "there")
    assert len([n for n, _ in wrapped.named_modules() if n.endswith("lora_A")]) == len(lora.lora_modules(m))
    inputs = for_transformers(m.encode(GUIDE))
    found = means(m, m.encode(GUIDE))
    want = float(wrapped.base_model.model(**inputs).loss)
    assert float(found["loss/text"]) + K * float(found["loss/audio"]) == pytest.approx(want, rel=1e-5)
    assert abs(want - float(hf(**inputs).loss)) > 1e-3
    for folder in folders.values():  # both namings are read by either base
        for adapter in ("own", "there"):
            other = load(folder)
            loaded, skipped = lora.load_lora_weights(other, tmp_path / adapter)
            assert len(loaded) == len(names) and not skipped and mean_losses(other) == pytest.approx(mean_losses(m), rel=1e-6)


def test_a_peft_adapter_acts_here(folders, model, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    theirs = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(folders["transformers"], use_text_head=True).eval()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    wrapped = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=8, target_modules=names, modules_to_save=["audio_lm_head", "embed_audio_tokens.embed_audio_tokens"]))
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for n, p in wrapped.named_parameters():
            if "lora_B" in n or "modules_to_save" in n:
                p.add_(torch.randn(p.shape, generator=g) * 0.1)
    wrapped.save_pretrained(tmp_path)
    example = model.encode(GUIDE)
    want = float(wrapped.base_model.model(**for_transformers(example)).loss)
    for folder in folders.values():
        m = load(folder)
        loaded, skipped = lora.load_lora_weights(m, tmp_path)
        found = means(m, example)
        assert float(found["loss/text"]) + K * float(found["loss/audio"]) == pytest.approx(want, rel=1e-5)
        assert not skipped and len(lora.state(m).base) == 2
        m.save(tmp_path / f"merged_{m.naming}", "transformers", merged=True)
        again = transformers.HiggsAudioV2ForConditionalGeneration.from_pretrained(tmp_path / f"merged_{m.naming}", use_text_head=True).eval()
        assert float(again(**for_transformers(example)).loss) == pytest.approx(want, rel=1e-5)


def test_an_adapter_key_that_matches_nothing_is_an_error(folders, tmp_path):
    m = load(folders["original"])
    lora.apply_lora_to_model(m, {"r": 2})
    randomize(m)
    lora.save_lora_weights(m, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors, record = load_file(file), checkpoint.read_metadata(file)
    tensors = {n.replace("model.layers.0.", "model.tower.layers.0."): t for n, t in tensors.items()}
    save_file(tensors, file, record)
    with pytest.raises(Invalid, match="tower.layers.0.*no such module in this model"):
        lora.load_lora_weights(load(folders["transformers"]), tmp_path)


def test_tables_and_heads_can_be_trained_in_full(folders, tmp_path):
    m = load(folders["original"])
    lora.apply_lora_to_model(m, {"r": 2, "train_embeddings": True, "train_modules": ["audio_decoder_proj.audio_lm_head"]})
    full = {n for n, p in m.named_parameters() if p.requires_grad and ".lora_" not in n}
    assert full == {"audio_codebook_embeddings.weight", "audio_decoder_proj.audio_lm_head.weight"}
    with torch.no_grad():
        m.audio_codebook_embeddings.weight += 0.3
    lora.save_lora_weights(m, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["audio_codebook_embeddings", "audio_decoder_proj.audio_lm_head"]
    other = load(folders["transformers"])
    lora.load_lora_weights(other, tmp_path)
    assert mean_losses(other) == pytest.approx(mean_losses(m), rel=1e-6)


# ------------------------------------------------------------------------------------------------ learning


def test_two_clips_are_learnt_until_greedy_speech_gives_them_back(folders):
    """All codebooks, and the end: what a missing shift, delay, or end label would make impossible."""
    torch.manual_seed(0)
    m = load(folders["original"]).train()
    clips = [{"audio": codes(7, 11), "text": "the cat"}, {"audio": codes(4, 12), "text": "in it"}]
    batch, counts = m.collate([m.encode(c) for c in clips])
    optimizer = torch.optim.AdamW(m.parameters(), 3e-3)
    for _ in range(120):
        out = m(batch)
        loss = sum(out[k] / counts[k] for k in higgs.LAMBDAS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    m.eval()
    for clip in clips:
        got = torch.stack(list(m.frames(clip["text"], temperature=0)), 1)
        assert m.finish == ["end"] and torch.equal(got, clip["audio"].long())
        assert torch.equal(torch.stack(list(m.frames(clip["text"], seed=3)), 1), got)


def test_two_ranks_and_a_restart_give_the_run_of_one_process(folders, tmp_path):
    lines = []
    for i in range(5):
        t = torch.arange(int(24000 * (0.3 + 0.1 * i))) / 24000
        audio.write(tmp_path / f"{i}.wav", 0.3 * torch.sin(6.2832 * (120 + 30 * i) * t) * (1 + 0.3 * torch.sin(40 * t)), 24000)
        lines.append(json.dumps({"audio": f"{i}.wav", "text": f"clip {i} " * (1 + i % 3), "ref_audio": "0.wav", "ref_text": "clip 0"}))
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    prepared = start("prepare_data", ["--input", "rows.jsonl", "--output_dir", "data", "--ckpt_dir", folders["original"], "--val_split", 0], tmp_path)
    assert prepared.wait() == 0, prepared.said

    def tuned(name, world, *steps):
        for n in steps:
            argv = ["--pretrained_path", folders["original"], "--train_manifest", "data/train.jsonl", "--save_path", name, "--num_iters", n, "--max_steps", 4,
                    "--warmup_steps", 0, "--learning_rate", 1e-2, "--grad_accum_steps", 2 // world, "--num_workers", 0, "--max_batch_tokens", 0,
                    "--lora.r", 2, "--lora.dropout", 0.1, "--val_samples", 0]
            runs = ranks(world, "train", argv, tmp_path) if world > 1 else [start("train", argv, tmp_path)]
            assert all(r.wait(300) == 0 for r in runs), "".join(r.said for r in runs)
        return load_file(tmp_path / name / "latest" / "adapter_model.safetensors")

    straight, resumed, two = tuned("straight", 1, 4), tuned("resumed", 1, 2, 4), tuned("two", 2, 4)
    assert all(torch.equal(w, resumed[n]) for n, w in straight.items())
    assert all(torch.allclose(w, two[n], rtol=1e-4, atol=1e-5) for n, w in straight.items())


def test_samples_are_conditioned_as_the_rows_are(folders, model):
    row = {"text": "new", "ref_audio": codes(3), "ref_text": "old"}
    told = load(folders["original"], reference_in="system", scene="Quiet.").sample_request(row)
    assert told["prompts"][0][0] == "old" and (told["reference_in"], told["scene"]) == ("system", "Quiet.")
    assert model.sample_request({**GUIDE, **row})["reference_in"] == "user"
    assert list(model.frames("new", seed=1, **dict(told, max_len=2, min_len=2)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.sample_request({"text": "new"})["prompts"] == []


def test_shapes_for_measuring_are_the_published_ones():
    config, _ = higgs.shape("real")
    assert config == higgs.PUBLISHED
    m = higgs.blank("tiny", "", torch.device("cpu"), torch.float32)
    clip = m.encode({"audio": m.encode_audio(noise(24000)), "text": "xxxx"})
    assert m.length(clip) > 25 and len(list(m.frames("xxxx", seed=0, min_len=5, max_len=5))) == 5
    with pytest.raises(Invalid, match="only one Higgs Audio"):
        higgs.shape("tiny", "3")


# ------------------------------------------------------------------------------------------------ parts that lie elsewhere


def elsewhere(root):
    """A base without its codec, and the codec under another name."""
    base = tiny_higgs.write(root / "bases" / "one", codec="none")
    return base, tiny_higgs.write_codec(root / "far")


def row_file(root):
    wave = 0.3 * torch.sin(torch.arange(24000) / 24000 * 1500) + 0.1 * noise(24000)
    audio.write(root / "a.wav", wave, 24000)
    (root / "rows.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "Hello there."}) + "\n")
    return root / "rows.jsonl"


def test_a_codec_elsewhere_is_given_recorded_and_found_again(tmp_path):
    base, far = elsewhere(tmp_path)
    rows, part = row_file(tmp_path), ("--extra.codec", far)

    def ended(script, *argv):
        process = start(script, argv, tmp_path)
        return process.wait(), process.said

    common = ("--pretrained_path", base, "--train_manifest", rows, "--num_iters", 1, "--warmup_steps", 0, "--max_batch_tokens", 0, "--val_samples", 0)
    code, said = ended("prepare_data", "--input", rows, "--output_dir", "data", "--ckpt_dir", base, "--val_split", 0)
    assert code == 1 and all(word in said for word in ("audio tokenizer", str(base / tiny_higgs.CODEC), str(base.parent / tiny_higgs.CODEC),
                                                       "hub cache", "hf download bosonai/higgs-audio-v2-tokenizer", "--extra.codec"))
    assert ended("prepare_data", "--input", rows, "--output_dir", "data", "--ckpt_dir", base, "--val_split", 0, *part)[0] == 0
    code, said = ended("train", *common, "--save_path", "voice", "--lora.r", 2, *part)
    assert code == 0, said
    latest = tmp_path / "voice" / "latest"
    assert adapters.read_record(latest)["extra"] == {"codec": str(far)}
    assert f"codec: {far}" in (tmp_path / "voice" / "config.yaml").read_text()
    speak = ("--text", "Hello.", "--max_len", 3, "--min_len", 2, "--output", "out.wav")
    assert ended("infer", "--lora", latest, *speak)[0] == 0  # the record is enough
    assert ended("infer", "--ckpt_dir", base, *speak)[0] == 1
    assert ended("infer", "--ckpt_dir", base, *speak, *part)[0] == 0
    code, said = ended("infer", "--ckpt_dir", base, *speak, "--extra.codec", "nowhere")
    assert code == 1 and "extra.codec" in said
    code, said = ended("infer", "--ckpt_dir", base, *speak, "--extra.bigvgan", far)
    assert code == 1 and "extra.bigvgan: this backbone keeps no such part apart; it has codec, tokenizer" in said
    assert ended("merge_lora", "--lora", latest, "--output_dir", "merged")[0] == 0
    assert load(tmp_path / "merged").codec_key  # whole by itself
    assert ended("merge_lora", "--lora", latest, "--output_dir", "again", "--to", "peft", "--naming", "transformers")[0] == 0
    assert adapters.read_record(tmp_path / "again")["extra"] == {"codec": str(far)}
    (tmp_path / "far").rename(base.parent / tiny_higgs.CODEC)  # the recorded place is gone; it is found by its published name
    assert ended("infer", "--lora", latest, *speak)[0] == 0
    code, said = ended("train", *common[:4], *common[6:], "--num_iters", 2, "--save_path", "voice", "--lora.r", 2, *part)
    assert code == 0 and "going on from" in said


def test_a_codec_is_found_in_the_hub_cache(tmp_path, monkeypatch):
    base, far = elsewhere(tmp_path)
    cache = tmp_path / "hub" / "models--bosonai--higgs-audio-v2-tokenizer"
    (cache / "snapshots").mkdir(parents=True)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    far.rename(cache / "snapshots" / "abc")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    assert load(base).codec_key and models.parts_elsewhere(base, {}) == {"codec": str(cache / "snapshots" / "abc")}
    beside = tiny_higgs.write_codec(base.parent / tiny_higgs.CODEC, "transformers")
    assert models.parts_elsewhere(base, {}) == {"codec": str(beside)}  # nearer
    inside = tiny_higgs.write_codec(base / tiny_higgs.CODEC)
    assert models.find_parts(higgs, base, {})["codec"] == inside and models.parts_elsewhere(base, {}) == {}
