"""Mutants of inference, merging and generation: the numbered items are those of specs/voxcpm.md 6 and 7, 0 is what the scripts add."""


def only(file, *names):
    return " ".join(f"tests/test_{file}.py::{name}" for name in names)


MUTANTS = [
    (6, "models/voxcpm.py", "if n > s.min_len:", "if n >= s.min_len:", only("infer", "test_the_stop_head_is_first_asked_after_min_len")),
    (6, "models/voxcpm.py", 's.length_ratio * request["tokens"] + MORE_PATCHES', 's.length_ratio * len(request["ids"]) + MORE_PATCHES',
     only("infer", "test_the_cap_is_the_least_of_text_length_max_len_and_what_the_model_holds")),
    (6, "models/voxcpm.py", 'self.config.max_length - len(request["ids"])', "self.config.max_length",
     only("infer", "test_the_cap_is_the_least_of_text_length_max_len_and_what_the_model_holds")),
    (6, "models/parts/sampling.py", 'seed=request["seed"] + attempt', 'seed=request["seed"]', only("infer", "test_only_takes_that_ran_away_are_tried_again")),
    (6, "models/parts/sampling.py", "frames = {i: [] for i in left}\n", "frames = {i: [] for i in left} if attempt == 0 else frames\n", only("infer", "test_only_takes_that_ran_away_are_tried_again")),
    (6, "models/voxcpm.py", 'len(patches) >= s.length_ratio', 'len(patches) > s.length_ratio * 9', only("infer", "test_only_takes_that_ran_away_are_tried_again")),
    (6, "models/voxcpm.py", "                patch = patch[going]\n", "",
     only("infer", "test_finished_rows_leave_the_batch_and_disturb_nobody")),
    (6, "models/voxcpm.py", "                    part.keep(going)\n", "                    part.keep(going * 0)\n", only("infer", "test_finished_rows_leave_the_batch_and_disturb_nobody")),
    (6, "models/voxcpm.py", "kept = source[-T:] if left else source[:T]", "kept = source[:T]", only("infer", "test_prompts_may_be_latents_and_wrong_ones_are_refused")),
    (6, "models/parts/sampling.py", "size[i] = min(2 * size[i], most)", "size[i] = 10**9", only("infer", "test_the_first_chunk_comes_before_the_first_step_and_later_ones_grow_to_sixteen")),
    (6, "models/voxcpm.py", 'if len(request["warm"]):', "if False:", "tests/test_voxcpm.py -k waveform"),
    (6, "models/codecs/audiovae.py", "self.past = {layer: tail.clone() for layer, tail in self.past.items()}", "pass", "tests/test_audiovae.py -k remembers"),
    (7, "lora.py", "        module.lora_scale.fill_(module.lora_full_scale * new)\n", "        module.lora_scale.fill_(module.lora_full_scale)\n",
     only("infer", "test_adapters_act_with_their_strength_and_add_up")),
    (7, "lora.py", "(base.float() + update).to(base.dtype)", "base + update.to(base.dtype)",
     only("merge", "test_a_merged_folder_keeps_the_dtype_of_its_base")),
    (7, "merge_lora.py", "        keep_strength(model)\n", "", only("merge", "test_a_strength_goes_into_alpha_and_several_become_one")),
    (7, "merge_lora.py", "    finally:\n        checkpoint.remove(tmp)\n", "    finally:\n", only("merge", "test_a_failure_while_writing_leaves_nothing")),
    (7, "merge_lora.py", "if cfg.dtype else None\n", "if cfg.dtype else models.pick_dtype('float32', device)\n",
     only("merge", "test_a_merged_folder_keeps_the_dtype_of_its_base")),
    (7, "models/parts/adapters.py", "return round(alpha) if abs(alpha - round(alpha)) < 1e-6 else alpha", "return alpha", only("merge", "test_there_and_back_an_adapter_is_bit_equal")),
    (0, "infer.py", "audio.pcm16(chunk).tobytes()", "(chunk.clamp(-1, 1) * 32767).round().to(torch.int16).numpy().tobytes()",
     only("infer", "test_streaming_gives_the_samples_of_the_file")),
    (0, "infer.py", "max(1, math.floor(", "max(1, math.ceil(", only("infer", "test_the_length_in_milliseconds_is_never_exceeded")),
    (0, "infer.py", "RETRIES = 3", "RETRIES = 2", only("infer", "test_a_runaway_take_is_tried_again_with_the_next_seeds")),
    (0, "infer.py", 'item = {"prompt_audio": "", "prompt_text": "", **item}', "pass", only("infer", "test_a_line_with_its_own_recording_does_not_take_the_words_of_another")),
    (0, "infer.py", "names = [Path(request.output).resolve() for request in requests]", "names = [request.output for request in requests]", only("infer", "test_every_wrong_line_is_named_before_anything_is_loaded")),
    (0, "infer.py", "if folder.resolve() in target.resolve().parents:", "if '..' not in target.parts:", only("infer", "test_every_wrong_line_is_named_before_anything_is_loaded")),
    (0, "infer.py", '.split("\\n")', ".splitlines()", only("infer", "test_a_text_file_becomes_one_file_per_line")),
    (0, "infer.py", "        if len(requests) == 1:\n", "        if True:\n", only("infer", "test_a_line_that_fails_is_counted_and_the_others_are_written")),
    (0, "infer.py", "        sys.exit(1)\n", "        pass\n", only("infer", "test_a_line_that_fails_is_counted_and_the_others_are_written")),
]
