"""Mutants of the training script and of its step folders: the numbered items are those of the issue's list of what must be shown."""


def only(*names):
    return " ".join(f"tests/test_train.py::{name}" for name in names)


MUTANTS = [
    # resume
    (5, "train.py", "progress.epoch, progress.position = ready.epoch, ready.position",
     "progress.epoch, progress.position = order.epoch, order.position",
     only("test_sigterm_and_sigint_finish_the_step_save_and_resume_exactly")),
    (5, "train.py", "    masters.load_state(optimizer, saved[\"optimizer\"])\n", "", only("test_eleven_steps_and_nine_in_a_new_process_are_twenty")),
    (5, "train.py", 'torch.manual_seed(seed_from(cfg.seed, "dropout", progress.step, micro.number))', "pass", only("test_eleven_steps_and_nine_in_a_new_process_are_twenty")),
    (5, "train.py", 'seed_from(cfg.seed, "dropout", progress.step, micro.number)', 'seed_from(cfg.seed, "dropout", micro.number)', only("test_dropout_is_drawn_anew_in_every_step")),
    (5, "train.py", "source, weights = past.folder, None", "source, weights = source, None", only("test_eleven_steps_and_nine_in_a_new_process_are_twenty")),
    (5, "train.py", "        lora.restore_lora_weights(model, folder, cfg.ignore_base)\n", "        pass\n", only("test_eleven_steps_and_nine_in_a_new_process_are_twenty")),
    (5, "models/parts/run.py", '"steps", "micro_per_step", "folder")', '"steps", "folder")', only("test_two_ranks_save_and_one_goes_on")),
    (5, "train.py", '"dropout", progress.step, micro.number', '"dropout", progress.step, micro.number // world', only("test_two_ranks_save_and_one_goes_on")),
    (5, "models/parts/run.py", '0 <= step_of(line) <= step', "True", only("test_tensorboard_has_each_step_once_after_a_resume")),
    (5, "models/parts/run.py", "purge_step=step + 1 if step else 0", "purge_step=None", only("test_tensorboard_has_each_step_once_after_a_resume")),
    (5, "train.py", "            parameter.data.copy_(value)\n", "            pass\n", only("test_bf16_weights_have_float32_masters_and_resume_exactly", "test_save_modes")),
    (5, "train.py", "    exact = masters.exact\n", "    exact = True\n", only("test_bf16_weights_have_float32_masters_and_resume_exactly")),
    (5, "models/parts/run.py", "int(path.name[5:]) > past.step", "False", only("test_a_run_goes_on_from_before_the_damage_and_ends_alike")),
    (5, "train.py", "stay = [held, progress.best.step] if cfg.keep_best else [held]", "stay = [progress.best.step]", only("test_what_is_kept_and_that_a_full_run_outlives_the_folder_it_came_from")),
    (5, "train.py", 'dataclasses.replace(cfg, overwrite=False, resume_from="")', "cfg", only("test_a_run_stays_what_it_is_under_its_own_config")),
    (5, "models/parts/checkpoint.py", 'if len(stated) != 8 or f"{zlib.crc32(text.replace(stated, NO_SUM).encode()):08x}" != stated:', "if False:", only("test_one_flipped_byte_anywhere_in_the_index_is_noticed")),
    (5, "models/parts/checkpoint.py", "        if checksum(path) != crc:", "        if False:", only("test_damage_to_any_file_of_a_checkpoint_is_noticed")),
    (5, "models/parts/checkpoint.py", "    os.rename(tmp, folder)\n", "    shutil.copytree(tmp, folder)\n",
     only("test_killed_while_saving_it_goes_on_from_the_last_complete_step")),
    # settings that must agree
    (5, "models/parts/run.py", "{**usual, **flat(there)}", "flat(there)",
     only("test_a_run_that_is_older_than_a_setting_had_its_default")),
    (5, "models/parts/run.py", "        if old != new and [old] != new:", "        if old != new:", only("test_a_run_whose_settings_were_recorded_as_they_were_written_goes_on")),
    (5, "models/parts/run.py", "        if key != section and there.get(section) != here.get(section):", "        if False:",
     only("test_a_run_folder_of_another_run_is_refused_with_the_keys_that_differ")),
    (5, "train.py", '{**dataclasses.asdict(cfg), "backbone": options, "lambdas": lambdas}', "dataclasses.asdict(cfg)",
     only("test_a_default_that_a_later_version_changes_is_a_difference")),
    # order of rows
    (5, "train.py", "if self.position == len(self.batches):", "if self.position >= len(self.batches) - 1:", only("test_every_row_comes_exactly_once_per_epoch", "test_the_log_shows_every_row_once_per_epoch")),
    (5, "train.py", "            batch.append(i)\n        batches.append(batch)", "            batch.append(i)\n        batches.append(batch[:1])", only("test_every_row_comes_exactly_once_per_epoch", "test_the_log_shows_every_row_once_per_epoch")),
    (5, "train.py", 'random.Random(seed_from(cfg.seed, "order", epoch))', 'random.Random(seed_from(cfg.seed, "order"))', only("test_every_row_comes_exactly_once_per_epoch", "test_the_log_shows_every_row_once_per_epoch")),
    # gradients
    (6, "train.py", "weight = {k: lambdas[k] / max(counts[k], 1) for k in lambdas}", "weight = {k: lambdas[k] / max(counts[k], 1) * world for k in lambdas}",
     only("test_micro_batches_and_ranks_do_not_change_the_gradient")),
    (6, "train.py", "        counts = all_sum(counts, device)\n", "", only("test_micro_batches_and_ranks_do_not_change_the_gradient")),
    (6, "train.py", "    dist.all_reduce(flat)\n", "", only("test_micro_batches_and_ranks_do_not_change_the_gradient")),
    (6, "train.py", "if longest and norm > longest:", "if False:", only("test_long_gradients_are_cut_to_the_norm")),
    (6, "train.py", "return seed_from(cfg.seed, \"draw\", epoch, row[\"id\"])", "return random.getrandbits(30)", only("test_eleven_steps_and_nine_in_a_new_process_are_twenty")),
    # numbers that are none
    (3, "train.py", "if math.isfinite(norm) and math.isfinite(loss):", "if math.isfinite(loss):", only("test_an_infinite_gradient_is_caught_although_the_loss_is_finite")),
    (3, "train.py", "if math.isfinite(norm) and math.isfinite(loss):", "if True:", only("test_a_step_with_nan_is_skipped_and_its_rows_are_named", "test_three_in_a_row_end_the_run_with_the_last_good_state")),
    (3, "train.py", "    bad = all_sum(bad, device)\n", "", only("test_a_step_with_nan_is_skipped_and_its_rows_are_named")),
    (3, "train.py", "BAD_STEPS = 3 ", "BAD_STEPS = 4 ", only("test_three_in_a_row_end_the_run_with_the_last_good_state")),
    (3, "train.py", "            bad = 0\n", "            pass\n", only("test_a_step_with_nan_is_skipped_and_its_rows_are_named")),
    # signals, validation, schedule, keeping
    (1, "train.py", "            if hurry:\n                save_now()", "            if broken:\n                save_now()", only("test_sigterm_and_sigint_finish_the_step_save_and_resume_exactly")),
    (1, "models/parts/run.py", "            os._exit(130)\n", "            pass\n", only("test_a_second_sigint_leaves_at_once_and_before_the_first_step_so_does_the_first")),
    (1, "train.py", 'totals = all_sum({**totals, "signals": len(signals)}, device)', 'totals = all_sum(totals, device) | {"signals": len(signals)}', only("test_a_signal_to_one_rank_stops_both_at_the_same_step")),
    (1, "train.py", "        return 0.0\n    return cfg.learning_rate", "        pass\n    return cfg.learning_rate", only("test_the_learning_rate_rises_falls_and_stays_at_zero")),
    (1, "train.py", "    model.train()\n    return {\"loss/total\"", "    return {\"loss/total\"", only("test_eleven_steps_and_nine_in_a_new_process_are_twenty", "test_validation_and_its_samples_do_not_disturb_training", "test_validation_is_the_mean_over_the_whole_set_on_any_number_of_ranks")),
    (1, "train.py", "batches[place.rank :: place.world]", "batches[place.rank + 1 :: place.world]", only("test_validation_is_the_mean_over_the_whole_set_on_any_number_of_ranks")),
    (1, "train.py", "better = saving and total", "better = total", only("test_the_best_is_one_that_was_saved")),
    (1, "train.py", "math.floor(after / every", "math.ceil(after / every", only("test_epochs_and_saves_by_epoch")),
    (5, "models/parts/run.py", "return own if own and own.resumed_from == str(chosen.resolve()) else Progress.read(chosen)",
     "return Progress.read(chosen)",
     only("test_the_same_command_goes_on_from_what_it_made_after_resume_from")),
    (5, "models/parts/run.py", '(root / "latest").resolve() != folder', "False", only("test_latest_is_mended_where_a_kill_left_it_behind")),
    (5, "models/parts/run.py", "        fcntl.flock(LOCKS[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)\n", "", only("test_two_runs_do_not_share_a_folder")),
    (5, "train.py", "dict(past.speakers) if past else {}", "{}",
     only("test_a_speaker_keeps_the_number_it_had_when_the_run_began")),
    (5, "models/parts/listen.py", "        except (Invalid, OSError, RuntimeError) as e:", "        except Invalid as e:", only("test_neither_a_closed_pipe_nor_a_sample_ends_a_run")),
    (5, "models/parts/run.py", "        with contextlib.suppress(OSError):  # nobody", "        with contextlib.suppress(KeyError):  # nobody",
     only("test_neither_a_closed_pipe_nor_a_sample_ends_a_run")),
    (1, "train.py", "span = steps if by_data else cfg.max_steps or steps", "span = cfg.max_steps or steps", only("test_epochs_and_saves_by_epoch")),
    (1, "models/parts/run.py", "    if row.get(\"turns\"):\n        return 0", "    if True:\n        return 0", only("test_rows_too_long_by_their_audio_are_not_encoded")),
]
