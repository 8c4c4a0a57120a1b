"""What other tools call our settings. `configs` reads it; tests/coming_from.yaml says whose they are."""

# Script -> canonical key -> names accepted as well, in YAML and as flags. "-" is "_". An alias of a key in a
# section counts at the top level and in the section. One or two letters also take a single dash.
# The losses' weights of moshi-finetune and sesame-finetune become weights of our means: the same purpose, but
# another number.
ALIASES = {
    "train": {
        "config": ("config_path",),
        "pretrained_path": ("base_model", "base_ckpt", "model_path", "base_checkpoint", "model_name_or_path",
                            "init_model_path"),
        "train_manifest": ("data_path", "train_data", "train_jsonl"),
        "val_manifest": ("val_data", "eval_data", "val_data_path"),
        "save_path": ("output_dir", "run_dir", "output_model_path"),
        "tensorboard": ("logging_dir",),
        "batch_size": ("per_device_train_batch_size", "batch_size_per_gpu"),
        "max_length": ("max_seq_len",),
        "grad_accum_steps": ("grad_accum", "grad_accumulation", "grad_acc_steps",
                             "gradient_accumulation_steps", "num_microbatches"),
        "learning_rate": ("lr",),
        "weight_decay": ("wd",),
        "warmup_steps": ("warmup", "num_warmup_updates"),
        "epochs": ("n_epochs", "num_epochs", "num_train_epochs"),
        "log_interval": ("log_every", "log_freq", "log_steps", "logging_steps"),
        "sample_texts": ("sample_prompt",),
        "valid_interval": ("val_every", "val_interval", "eval_freq", "eval_steps", "val_steps"),
        "save_interval": ("save_every", "ckpt_freq", "save_steps", "save_per_updates"),
        "max_grad_norm": ("grad_clip", "max_norm"),
        "checkpointing": ("gradient_checkpointing", "activation_checkpointing"),
        "lambdas.loss/semantic": ("semantic_weight", "first_codebook_weight_multiplier"),
        "lambdas.loss/acoustic": ("acoustic_weight", "decoder_loss_weight"),
        "lambdas.loss/text": ("text_loss_weight",),
        "lambdas.loss/mel": ("mel_loss_weight",),
        "backbone.context_turns": ("context_turns",),
        "backbone.mask_speakers": ("mask_speaker_ids",),
        "lora.r": ("lora_rank", "rank", "lora_r"),
        "lora.alpha": ("lora_alpha",),
        "lora.dropout": ("lora_dropout",),
        "lora.rslora": ("use_rslora",),
        "lora.bias": ("lora_bias",),
        "lora.target_modules": ("lora_target_modules", "target_modules"),
        "lora.target_layers": ("layers_to_transform", "target_layers"),
        "lora.train_modules": ("modules_to_save",),
        "lora.train_embeddings": ("train_embeddings", "ft_embed"),
        **{f"lora.{k}": (k,) for k in ("enable_lm", "enable_dit", "enable_proj", "target_modules_lm",
                                       "target_modules_dit", "target_proj_modules")},
    },
    "prepare": {
        "input": ("audio_dir", "manifest", "i"),
        "output_dir": ("output_json", "od"),
        "ckpt_dir": ("model_path", "pretrained_path", "base_model"),
        "transcripts": ("transcript_dir",),
        "speaker": ("speaker_id",),
    },
    "infer": {
        "config": ("config_path",),
        "ckpt_dir": ("model_path", "pretrained_path", "base_model", "base_ckpt"),
        "lora": ("lora_path", "lora_ckpt", "adapter"),
        "text": ("t",),
        "output": ("o", "output_path"),
        "input": ("i",),
        "output_dir": ("od",),
        "prompt_audio": ("pa",),
        "prompt_text": ("pt", "ref_text"),
        "reference_audio": ("ref_audio", "ra", "spk_audio_prompt"),
        "speaker": ("speaker_id",),
    },
    "sampling": {  # fields of a backbone's Sampling, which are infer.py's flags, too
        "emo_audio": ("emo_audio_prompt",),
    },
    "validate": {
        "ckpt_dir": ("model_path", "pretrained_path", "base_model", "base_ckpt"),
        "lora": ("lora_path", "lora_ckpt", "adapter"),
        "text": ("test_texts",),
        "reference_audio": ("ref_audio",),
        "manifest": ("val_manifest",),
        "speaker": ("speaker_id",),
    },
    "merge": {
        "ckpt_dir": ("model_path", "pretrained_path", "base_model", "base_ckpt"),
        "lora": ("lora_path", "lora_ckpt", "adapter"),
        "output_dir": ("od", "output"),
    },
}


class Scaling(float):
    """alpha / r, given instead of alpha; multiplied by r when both are known."""


# Keys that say another key in other words: script -> key -> (canonical key, type it is given in, its value
# there).
COMPUTED = {
    "train": {
        "scaling": ("lora.alpha", float, Scaling),
        "amp": ("dtype", bool, lambda on: "bfloat16" if on else "float32"),
        "generate_samples": ("val_samples", bool, lambda on: 2 * on),
    },
}
