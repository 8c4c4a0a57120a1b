"""One-line faults in VoxCPM, by the bullets of the sheet's section 9, and the golden or property test that must see each."""
MODEL, LAYERS, CODEC = "models/voxcpm.py", "models/parts/layers.py", "models/codecs/audiovae.py"
CHECKPOINT, ADAPTERS, LORA = "models/parts/checkpoint.py", "models/parts/adapters.py", "lora.py"


def seen_by(words):
    return f"tests/test_voxcpm.py -k {words}"


LOSSES, LATENTS, TEXT = seen_by("losses_equal"), seen_by("generated_latents"), seen_by("token_ids")
CODEC_TEST, ADAPTER, SETTINGS = seen_by("codec_encodes"), seen_by("adapter_acts"), seen_by("other_settings")
HISTORY = seen_by("noise_on_the_past")
GRADIENTS, ROUNDING, DRAWS = seen_by("gradients_equal"), seen_by("bfloat16_rounds"), seen_by("distributions")

MUTANTS = [
    # 1: use_mup, factors, heads, positions
    ("9.1 branches always scaled", MODEL, "        if lm.use_mup:\n", "        if True:\n", LOSSES),
    ("9.1 branches never scaled", MODEL, "size = size._replace(branch=lm.scale_depth / math.sqrt(num_layers))", "pass", SETTINGS),
    ("9.1 embeddings always scaled", MODEL, "if self.config.lm_config.use_mup else x", "if True else x", LOSSES),
    ("9.1 mup off by default", MODEL, "use_mup: bool = True", "use_mup: bool = False", seen_by("mup_is_on")),
    ("9.1 no factors", MODEL, "self.lm.rope_theta, factors)", "self.lm.rope_theta, None)", LOSSES),
    ("9.1 factors multiply", LAYERS, "frequencies / torch.tensor(factors", "frequencies * torch.tensor(factors", LOSSES),
    ("9.1 long factors at once", MODEL, '"long_factor" if ratio > 1', '"long_factor" if ratio >= 1', LOSSES),
    ("9.1 short factors for ever", MODEL, '"long_factor" if ratio > 1', '"long_factor" if ratio > 9', SETTINGS),
    ("9.1 no attention scaling", MODEL, "self.rope_scale = math.sqrt(1 +", "self.rope_scale = 1 if ratio else math.sqrt(1 +", SETTINGS),
    ("9.1 other theta", LAYERS, "theta**exponents", "(2 * theta) ** exponents", LOSSES),
    ("9.1 rotated backwards", LAYERS, "sin = torch.cat([-sin, sin], -1)", "sin = torch.cat([sin, -sin], -1)", LOSSES),
    ("9.1 key heads of the local stacks", MODEL, "kv_heads=lm.num_key_value_heads, head_size=c.head_size", "kv_heads=c.num_heads, head_size=c.head_size", LOSSES),
    ("9.1 key heads of the LMs", MODEL, "kv_heads=lm.num_key_value_heads, head_size=lm.head_size", "kv_heads=lm.num_attention_heads, head_size=lm.head_size", LOSSES),
    ("9.1 key heads in turn", LAYERS, "    k = k.repeat_interleave(H // G, 1)\n    v = v.repeat_interleave(H // G, 1)\n", "    k = k.repeat(1, H // G, 1, 1)\n    v = v.repeat(1, H // G, 1, 1)\n", LOSSES),
    ("9.1 head size from the width", MODEL, "return self.kv_channels or self.hidden_size", "return self.hidden_size", LOSSES),
    ("9.1 positions in V2's residual LM", MODEL, "use_rope=not c.residual_lm_no_rope", "use_rope=True", LOSSES),
    ("9.1 no positions in any residual LM", MODEL, "use_rope=not c.residual_lm_no_rope", "use_rope=False", LOSSES),
    ("9.1 LMs see ahead", LAYERS, "y = attend(q, k, v, causal=True)", "y = attend(q, k, v)", LOSSES),
    # 2: norms and the local encoder
    ("9.2 weight before the cast", LAYERS, "None, self.eps) * self.weight", "self.weight, self.eps)", ROUNDING),
    ("9.2 other epsilon", LAYERS, "None, self.eps) *", "None, self.eps / 10) *", LOSSES),
    ("9.2 no final norm", MODEL, "return self.norm(x)", "return x", LOSSES),
    ("9.2 special token last", MODEL, "torch.cat([first, x], 1)", "torch.cat([x, first], 1)", LOSSES),
    ("9.2 last position taken", MODEL, "self.encoder.local(x, keep=slice(0, 1))", "self.encoder.local(x, keep=slice(-1, None))", LOSSES),
    # 3: the quantiser
    ("9.3 text quantised too", MODEL, "e = flat.index_copy(0, place, coarse).view_as(e)", "e = self.fsq_layer(e)", LOSSES),
    ("9.3 residual LM gets the raw state", MODEL, "self.residual_lm(self._residual_input(e, spoken)", "self.residual_lm(self._residual_input(flat.view_as(e), spoken)", LOSSES),
    ("9.3 nothing quantised", MODEL, "q = torch.round(y * self.levels) / self.levels", "q = y", LOSSES),
    ("9.3 not quantised step by step", MODEL, "e = self.fsq_layer(self.base_lm(x, contexts[0], caches[0]))",
     "e = self.base_lm(x, contexts[0], caches[0])", LATENTS),
    ("9.3 no gradient through rounding", MODEL, "y + (q - y).detach() if self.training else q", "q", GRADIENTS),
    # 4: the shift
    ("9.4 no shift", MODEL, "place[target] - 1", "place[target]", LOSSES),
    ("9.4 shift by two", MODEL, "place[target] - 1", "place[target] - 2", LOSSES),
    ("9.4 condition not shifted", MODEL, "torch.cat([torch.zeros_like(past[:1]), past[:-1]]) for", "past for", LOSSES),
    ("9.4 last prompt patch forgotten", MODEL, 'if request["ids"][-1] == PATCH:', "if False:", LATENTS),
    ("9.4 reference taken for a prompt", MODEL, 'if request["ids"][-1] == PATCH:', 'if len(request["patches"]):', LATENTS),
    ("9.4 stop from the residual state", MODEL, "logits = self._stop_logits(lm_h)", "logits = self._stop_logits(res_h)", LOSSES),
    ("9.4 stop asked one patch early", MODEL, "if n > s.min_len:", "if n >= s.min_len:", LATENTS),
    # 5: marks and labels
    ("9.5 label one patch early", MODEL, "stop[ends.cumsum(0) - 1] = 1", "stop[ends.cumsum(0) - 2] = 1", LOSSES),
    ("9.5 other reference marks", MODEL, "mark(REF_START), clip(reference, False), mark(REF_END)", "mark(REF_END), clip(reference, False), mark(REF_START)", LOSSES),
    ("9.5 the reference is trained", MODEL, "clip(reference, False)", "clip(reference, True)", LOSSES),
    ("9.5 speech starts with 102", MODEL, "self.encode_text(transcripts + text) + [AUDIO_START]", "self.encode_text(transcripts + text) + [AUDIO_START + 1]", LATENTS),
    ("9.5 training starts with 102", MODEL, "torch.tensor(ids + [AUDIO_START])", "torch.tensor(ids + [AUDIO_START + 1])", seen_by("training_audio")),
    ("9.5 length without 102", MODEL, 'len(example["latents"]) + 1 + reference', 'len(example["latents"]) + reference', seen_by("training_audio")),
    # 6: time
    ("9.6 step size not embedded", MODEL, "return time + self.delta_time_mlp(", "return time + 0 * self.delta_time_mlp(", LOSSES),
    ("9.6 other time scale", MODEL, "angle = 1000 * t", "angle = 999 * t", LOSSES),
    ("9.6 cosines first", MODEL, "torch.cat([angle.sin(), angle.cos()], -1)", "torch.cat([angle.cos(), angle.sin()], -1)", LOSSES),
    ("9.6 divisor half", MODEL, "(-math.log(10000) / (half - 1))", "(-math.log(10000) / half)", LOSSES),
    ("9.6 time always in float32", MODEL, "k = torch.arange(half, dtype=t.dtype", "t = t.float(); k = torch.arange(half, dtype=t.dtype", ROUNDING),
    # 7: flow and guidance
    ("9.7 condition zeroed with mu", MODEL, "dit.cond_proj(cond).repeat(2, 1, 1)", "dit.cond_proj(torch.cat([cond, torch.zeros_like(cond)]))", LATENTS),
    ("9.7 times of the next step", MODEL, "times[i]", "times[i + 1]", LATENTS),
    ("9.7 mu kept", MODEL, "torch.cat([mu, torch.zeros_like(mu)])", "torch.cat([mu, mu])", LATENTS),
    ("9.7 no rescaling", MODEL, "scale = (a * b).sum(1) / (b.square().sum(1) + 1e-8)", "scale = torch.ones(len(a))", LATENTS),
    ("9.7 rescaling per frame", MODEL, "with_mu.flatten(1), without.flatten(1)", "with_mu.mean(1), without.mean(1)", LATENTS),
    ("9.7 first step taken", MODEL, "for i in range(idle, steps):", "for i in range(steps):", LATENTS),
    ("9.7 one step skipped always", MODEL, "for i in range(idle, steps):", "for i in range(1, steps):", LATENTS),
    ("9.7 no sway", MODEL, "(t + (torch.cos(torch.pi / 2 * t) - 1 + t)).float()", "t.float()", LATENTS),
    ("9.7 sign of the step", MODEL, "x = x - (t[i] - t[i + 1]) * velocity", "x = x + (t[i] - t[i + 1]) * velocity", LATENTS),
    ("9.7 data minus noise", MODEL, "(noise - clean)", "(clean - noise)", LOSSES),
    ("9.7 time runs the other way", MODEL, "(1 - t) * clean + t * noise", "t * clean + (1 - t) * noise", LOSSES),
    ("9.7 condition never dropped", MODEL, ' * batch["keep"][:, None].to(dtype)', "", LOSSES),
    ("9.7 times around a half", MODEL, "TIME_SHIFT = -0.4", "TIME_SHIFT = 0.0", DRAWS),
    ("9.7 keeps and drops swapped", MODEL, "else ~dropped", "else dropped", DRAWS),
    ("9.7 projections swapped", MODEL, "self.lm_to_dit_proj(lm_h), self.res_to_dit_proj(res_h)", "self.lm_to_dit_proj(res_h), self.res_to_dit_proj(lm_h)", LOSSES),
    # 8: latents and padding
    ("9.8 variance for mean", CODEC, "self.encoder.fc_mu(self.encoder(chunk, past), past)", "self.encoder.fc_logvar(self.encoder(chunk, past), past)", CODEC_TEST),
    ("9.8 latents not transposed", CODEC, "mu.transpose(1, 2).reshape(*wav", "mu.reshape(*wav", CODEC_TEST),
    ("9.8 prompt padded on the right", MODEL, "wave = F.pad(wave, (-len(wave) % (P * self.codec.hop), 0))",
     "wave = F.pad(wave, (0, -len(wave) % (P * self.codec.hop)))", seen_by("prompt_audio")),
    ("9.8 training padded on the left", MODEL, "F.pad(w, (0, -len(w) % whole))", "F.pad(w, (-len(w) % whole, 0))", seen_by("training_audio")),
    # 9: codec
    ("9.9 textbook padding in V1", CODEC, "2 * math.ceil(s / 2) if odd_stride_extra_pad else s", "s", CODEC_TEST),
    ("9.9 V1's padding in V2", CODEC, "2 * math.ceil(s / 2) if odd_stride_extra_pad else s", "2 * math.ceil(s / 2)", CODEC_TEST),
    ("9.9 norm over the output axis", CHECKPOINT, "vector_norm(v, dim=axes, keepdim=True)", "vector_norm(v, dim=[a for a in range(v.ndim) if a != 1], keepdim=True)", CODEC_TEST),
    ("9.9 weight norm without length", CHECKPOINT, "g.load().float() * v /", "v /", CODEC_TEST),
    ("9.9 snake without its epsilon", CODEC, "self.alpha + 1e-9)", "self.alpha)", "tests/test_audiovae.py"),
    ("9.9 dilations", CODEC, "for d in (1, 3, 9)]", "for d in (1, 3, 5)]", CODEC_TEST),
    ("9.9 depthwise first convolution", CODEC, "[Conv(latent_dim, latent_dim, 7, groups=latent_dim)", "[Conv(latent_dim, latent_dim, 7)", CODEC_TEST),
    ("9.9 codec in the model's dtype", MODEL, "model.equip(codec, read_tokenizer", "model.equip(codec.to(dtype), read_tokenizer", seen_by("keeps_its_codec")),
    ("9.9 always 48 kHz", CODEC, "sum((rate or self.out_sample_rate) > edge", "sum(self.out_sample_rate > edge", CODEC_TEST),
    # 10: adapters
    ("9.10 dropout before A", MODEL, "lora_dropout_after = True", "lora_dropout_after = False", seen_by("adapter_dropout")),
    ("9.10 other file name", ADAPTERS, '"voxcpm": ("lora_weights.safetensors"', '"voxcpm": ("adapter.safetensors"', seen_by("adapter_is_written")),
    ("9.10 adapters in the base's dtype", LORA, "torch.empty(s.r, module.in_features, device=device)",
     "torch.empty(s.r, module.in_features, device=device, dtype=module.weight.dtype)", seen_by("adapter_dropout")),
    ("9.10 foreign names skipped", ADAPTERS, 'wrong.append(f"{name} (no such module in this model)")', "adapter.skipped.append(name)", seen_by("foreign_name")),
    ("9.10 scale without r", ADAPTERS, "Meaning(settings, lambda module: alpha / r)", "Meaning(settings, lambda module: alpha)", ADAPTER),
    # 11: text
    ("9.11 pieces stay whole", MODEL, "pieces += list(bare) if bare in self.split_pieces else [piece]", "pieces += [piece]", TEXT),
    ("9.11 marker kept", MODEL, "pieces += list(bare) if", "pieces += list(piece) if", TEXT),
    ("9.11 whole pieces by their marked form", MODEL, "if bare in self.split_pieces else", "if len(bare) > 1 and bare[0] > '\\u4dff' else", TEXT),
    ("9.11 spaces as they come", MODEL, 're.sub(r"\\s+", " ", text.replace("\\n", " "))', "text", TEXT),
    ("9.11 stripped", MODEL, 're.sub(r"\\s+", " ", text.replace("\\n", " "))', 're.sub(r"\\s+", " ", text).strip()', TEXT),
    ("9.11 missing characters", MODEL, "self.tokenizer.vocab.get(piece, 0) for piece in pieces", "self.tokenizer.vocab[piece] for piece in pieces if piece in self.tokenizer.vocab", TEXT),
    ("9.11 prompt and target apart", MODEL, "ids += self.encode_text(transcripts + text)", "ids += self.encode_text(transcripts) + self.encode_text(text)", LATENTS),
    ("9.11 cap counts the prompt", MODEL, "tokens=len(target), seed=seed", "tokens=len(ids), seed=seed", LATENTS),
    ("9.11 cap off by one", MODEL, '* request["tokens"] + MORE_PATCHES)', '* request["tokens"] + MORE_PATCHES + 1)', LATENTS),
    # options of this project's own
    ("noise on what is wanted", MODEL, '"patches": patches, "place"', '"patches": history, "place"', HISTORY),
    ("noise alike for every channel", MODEL, "latents.std((0, 1), correction=0)", "latents.std()", HISTORY),
    ("noise alike for every clip", MODEL, "most * torch.rand(1, generator=generator)", "most * torch.ones(1)", HISTORY),
    ("noise in validation", MODEL, "history_noise and seed is not None", "history_noise", HISTORY),
    ("condition without noise", MODEL, "for *_, past in draws]", "for past in [e['latents'].float() for e in examples]]", HISTORY),
    ("guess in validation", MODEL, "if self.training:  # validation", "if True:  # validation", seen_by("the_guess")),
    ("guess without weight", MODEL, "diff + weight * wrong", "diff + wrong", seen_by("the_guess")),
    ("guess that teaches nothing", MODEL, "torch.cat([lm_h, res_h], -1).float() @", "torch.cat([lm_h, res_h], -1).float().detach() @", seen_by("the_guess")),
    ("noise at its full strength", MODEL, "s.noise_scale * noise.to", "noise.to", seen_by("scaled_noise")),
    # 12: files
    ("9.12 safetensors only", MODEL, '"pytorch_model.bin", "pytorch_model.bin.index.json")', '"pytorch_model.bin.index.json")', seen_by("wrapped_or_bare")),
    ("9.12 codec in transformers' names", MODEL, 'else (newer, published)', 'else (published, newer)', seen_by("either_form")),
    ("9.12 Chinese cut apart before merging", MODEL, 'if step.get("pattern") != HAN_SPLIT', "", seen_by("both_forms")),
    ("9.12 wrapper not opened", CHECKPOINT, 'WRAPPERS = ("state_dict", ', "WRAPPERS = (", seen_by("wrapped_or_bare")),
    ("9.12 V2's codec for all", MODEL, "audiovae.V2 if config.fused else audiovae.V1", "audiovae.V2", CODEC_TEST),
    ("9.12 missing tensors pass", CHECKPOINT, "    if match.missing or match.misfits or (", "    if match.misfits or (", seen_by("missing_or_foreign")),
]
