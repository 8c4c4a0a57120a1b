"""Make higgs.safetensors with Boson AI's own model, and load in it what is trained here.

    pip install -r tests/golden/requirements_higgs.txt; python tests/golden/make_higgs.py CHECKOUT

CHECKOUT is a clone of github.com/boson-ai/higgs-audio. For each row of tests/test_higgs.py (no reference, one in the
assistant's turn, one in the user's): ids, labels and columns from its ChatML code and collator, logits from its
forward; for two of them the columns that its greedy generation makes. Afterwards an adapter and a merged folder are
written here and loaded there, and the largest difference of the logits is printed.
"""
import copy
import json
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), sys.argv[1]]

import peft  # noqa: E402
import torch  # noqa: E402
from boson_multimodal.data_collator.higgs_audio_collator import HiggsAudioSampleCollator  # noqa: E402
from boson_multimodal.data_types import AudioContent, ChatMLSample, Message, TextContent  # noqa: E402
from boson_multimodal.dataset.chatml_dataset import ChatMLDatasetSample, prepare_chatml_sample  # noqa: E402
from boson_multimodal.model.higgs_audio import HiggsAudioConfig, HiggsAudioModel  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from transformers import AutoTokenizer, StaticCache, StoppingCriteriaList  # noqa: E402

import lora  # noqa: E402
import models  # noqa: E402
from tests import test_higgs, tiny_higgs  # noqa: E402

ASK = "<|start_header_id|>assistant<|end_header_id|>\n\n<|audio_out_bos|>"
CLOSE = 1e-4  # largest difference of logits between their model and ours


def conversation(row):
    """(messages, clips, first message that is trained) of a row as Boson's prompts are written."""
    if "messages" in row:
        parts = [(m["role"], m["content"]) for m in row["messages"]]
    else:
        said, asked = {"type": "audio", "audio": row["audio"]}, {"type": "text", "text": row["text"]}
        parts = [("user", [asked]), ("assistant", [said])]
        if "ref_audio" in row:
            voice, words = {"type": "audio", "audio": row["ref_audio"]}, {"type": "text", "text": row["ref_text"]}
            parts = [("user", [words]), ("assistant", [voice]), *parts]
        else:
            parts = [("system", [{"type": "text", "text": "Generate audio following instruction."}]), *parts]
    messages, clips = [], []
    for role, content in parts:
        written = []
        for part in content:
            if part["type"] == "audio":
                clips.append(part["audio"].long())
                written.append(AudioContent(audio_url="placeholder"))
            else:
                written.append(TextContent(text=part["text"]))
        messages.append(Message(role=role, content=written))
    return messages, clips, len(messages) - 1


def collated(config, ids, labels, clips):
    """What Boson's collator makes of one row."""
    starts = [sum(c.shape[1] for c in clips[:i]) for i in range(len(clips))]
    sample = ChatMLDatasetSample(
        input_ids=torch.tensor(ids), label_ids=None if labels is None else torch.tensor(labels),
        audio_ids_concat=torch.cat(clips, 1) if clips else None, audio_ids_start=torch.tensor(starts),
        audio_waveforms_concat=None, audio_waveforms_start=None, audio_sample_rate=None, audio_speaker_indices=None)
    collator = HiggsAudioSampleCollator(
        whisper_processor=None, encode_whisper_embed=False, audio_in_token_id=config.audio_in_token_idx,
        audio_out_token_id=config.audio_out_token_idx, audio_stream_bos_id=config.audio_stream_bos_id,
        audio_stream_eos_id=config.audio_stream_eos_id, pad_token_id=config.pad_token_id, return_audio_in_tokens=True,
        use_delay_pattern=True, audio_num_codebooks=8, round_to=1)
    batch = vars(collator([sample]))
    return {k: v for k, v in batch.items() if torch.is_tensor(v) and v.numel() and k != "reward"}


def forward(model, batch):
    with torch.no_grad():
        return model(**batch, return_dict=True)


def recorded(model, tokenizer, row):
    """Tensors of a row: its ids and labels with all columns, and the logits that predict something."""
    messages, clips, first = conversation(row)
    ids, labels, _, _ = prepare_chatml_sample(ChatMLSample(messages=messages, start_index=first), tokenizer)
    batch = collated(model.config, ids, labels, clips)
    out = forward(model, batch)
    real = out.attention_mask[0].bool()
    text_labels = out.expanded_labels[0][real]
    predicting = torch.cat([text_labels[1:] != -100, torch.tensor([False])])
    audio_labels = batch["label_audio_ids"]
    asked = torch.cat([(audio_labels[:, 1:] != -100).any(0), torch.tensor([False])])
    columns = out.audio_in_discrete_codes_mask[0][real] | out.audio_out_mask[0][real]
    return {"ids": out.expanded_input_ids[0][real], "text_labels": text_labels, "audio": columns,
            "heard": batch.get("audio_in_ids", torch.zeros(8, 0)).long(), "out": batch["audio_out_ids"], "audio_labels": audio_labels,
            "text_logits": out.logits[0][real][predicting], "audio_logits": out.audio_logits[asked]}, batch


def spoken(model, tokenizer, row):
    """The columns (8, L) of a greedy answer to a row without its own audio."""
    messages, clips, _ = conversation(row)
    ids, _, _, _ = prepare_chatml_sample(ChatMLSample(messages=messages[:-1]), tokenizer)
    batch = collated(model.config, ids + tokenizer.encode(ASK, add_special_tokens=False), None, clips[:-1])
    batch.pop("audio_out_ids_start_group_loc", None)
    settings = copy.deepcopy(model.config.text_config)
    cache = StaticCache(config=settings, max_batch_size=1, max_cache_len=256, device="cpu", dtype=torch.float32)
    _, audio = model.generate(
        **batch, max_new_tokens=40, use_cache=True, do_sample=False, ras_win_len=None, past_key_values_buckets={256: cache},
        stopping_criteria=StoppingCriteriaList([lambda ids, scores, **_: ids[:, -1] == model.config.audio_eos_token_id]),
        audio_out_bos_token_id=model.config.audio_out_bos_token_id, audio_eos_token_id=model.config.audio_eos_token_id)
    return audio[-1]


def apart(a, b):
    return max(float((a.logits - b.logits).abs().max()), float((a.audio_logits - b.audio_logits).abs().max()))


def their_model(folder):
    config = HiggsAudioConfig(**json.loads((folder / "config.json").read_text()))
    return HiggsAudioModel.from_pretrained(folder, config=config, torch_dtype=torch.float32).eval()


def check_adapter(base, batch, before):
    """An adapter and a merged folder of ours, loaded in Boson's class: their logits are the same."""
    model = models.load(base)
    torch.manual_seed(0)
    lora.apply_lora_to_model(model, {"r": 2, "alpha": 4, "target_modules": ["attn", "mlp", "audio_mlp"]})
    test_higgs.randomize(model)
    lora.save_lora_weights(model, base.parent / "adapter")
    model.save(base.parent / "merged", merged=True)
    adapted = forward(peft.PeftModel.from_pretrained(their_model(base), base.parent / "adapter").base_model.model, batch)
    merged = forward(their_model(base.parent / "merged"), batch)
    moved, difference = apart(adapted, before), apart(adapted, merged)
    print(f"adapter and merged folder in Boson's class: logits differ by {difference:.1e}, from the base by {moved:.2f}")
    assert difference < CLOSE < 100 * CLOSE < moved
    example, _ = model.collate([model.encode(test_higgs.ROWS[2])])
    with torch.no_grad():
        h = model.states(example)[example["audio_from"]]
        logits = model.audio_decoder_proj.audio_lm_head(h).view(-1, 8, 34)
    asked = torch.cat([(batch["label_audio_ids"][:, 1:] != -100).any(0), torch.tensor([False])])
    difference = float((logits - adapted.audio_logits[asked]).abs().max())
    print(f"{len(lora.lora_modules(model))} adapted modules: Boson's logits and ours differ by {difference:.1e}")
    assert difference < CLOSE


def main():
    with tempfile.TemporaryDirectory() as scratch:
        base = tiny_higgs.write(Path(scratch) / "base", "original")
        model, tokenizer = their_model(base), AutoTokenizer.from_pretrained(base)
        out = {}
        for number, row in enumerate(test_higgs.ROWS):
            tensors, batch = recorded(model, tokenizer, row)
            out |= {f"{number}.{name}": value for name, value in tensors.items()}
        for number in (0, 1):
            out[f"{number}.spoken"] = spoken(model, tokenizer, test_higgs.ROWS[number])
        check_adapter(base, batch, forward(model, batch))
    out = {name: value.contiguous().clone() for name, value in out.items()}
    out = {name: value.to(torch.int16) if value.dtype == torch.long else value for name, value in out.items()}
    save_file(out, Path(__file__).with_name("higgs.safetensors"))
    print({name: list(value.shape) for name, value in out.items()})


if __name__ == "__main__":
    main()
