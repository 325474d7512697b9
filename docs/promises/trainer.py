"""Promises of the trainer."""

from promises.promise import FAULTS, Promise

TRAINER = (
    Promise(
        23,
        "kill -9 at any moment loses at most one checkpoint interval; the end has the same bits.",
        "200 random moments, every system call of a save",
        (
            f"{FAULTS}kill.py::test_kills_at_random_moments",
            f"{FAULTS}kill.py::test_four_hundred_kills_at_random_moments",
            f"{FAULTS}kill.py::test_kill_at_every_system_call_of_a_save",
            f"{FAULTS}kill.py::test_power_cut_at_every_system_call_of_a_save",
        ),
    ),
    Promise(
        24,
        "A run goes on from any safe point, in the middle of a step too, to the bit.",
        ">= 100 positions",
        (
            f"{FAULTS}exact.py::test_resume_at_every_safe_point_is_exact",
            f"{FAULTS}exact.py::test_resume_is_exact_whatever_the_options",
        ),
        reached="12 settings of 2 steps, each resumed at all of its 6 to 20 positions",
    ),
    Promise(
        25,
        "Damage to a checkpoint is found, named and passed over for the one before.",
        "100 % of every file x 11 damages",
        (
            f"{FAULTS}damage.py::test_damage_is_found_and_the_one_before_is_taken",
            f"{FAULTS}damage.py::test_every_bit_of_a_manifest_matters",
            f"{FAULTS}disk.py::test_a_damaged_newest_checkpoint_is_passed_over_and_the_end_is_the_same",
            f"{FAULTS}disk.py::test_a_disk_that_writes_other_bits_than_it_was_given_is_found_at_once",
        ),
    ),
    Promise(
        26,
        "A full or broken disk costs that save and nothing else.",
        "every system call",
        (
            f"{FAULTS}disk.py::test_every_system_call_of_a_save_may_fail",
            f"{FAULTS}disk.py::test_training_goes_on_and_says_so",
        ),
    ),
    Promise(
        27,
        "An update that is not finite is skipped, counted, and never saved.",
        "weights unchanged to the bit",
        (
            f"{FAULTS}numbers.py::test_a_bad_update_leaves_the_weights_to_the_bit_and_is_counted",
            f"{FAULTS}numbers.py::test_too_many_in_a_row_stop_the_run_by_name",
            f"{FAULTS}disk.py::test_weights_that_are_not_finite_are_never_saved",
        ),
    ),
    Promise(
        28,
        "A reward that hangs, crashes, forks or answers nonsense is named within its time-out, without orphans.",
        "100 trials; None is never NaN",
        (
            f"{FAULTS}reward_faults.py::test_each_kind",
            f"{FAULTS}reward_faults.py::test_each_kind_five_times",
            f"{FAULTS}reward_faults.py::test_numbers_that_are_none_are_named_by_function_and_completion",
            f"{FAULTS}reward_faults.py::test_what_is_not_scored_is_no_fault",
        ),
        short="a process that leaves the group after its parent has ended by itself is not found",
    ),
    Promise(
        29,
        "A sampler or a process that dies ends the others by name.",
        "<= 60 s",
        (
            f"{FAULTS}ranks.py::test_a_rank_that_dies_ends_the_other_and_is_named",
            f"{FAULTS}ranks.py::test_ten_deaths_at_random_moments_and_every_end_is_the_same",
            f"{FAULTS}sampler_faults.py::test_completions_that_cannot_be_are_named",
            "tests/trainer/test_vllm.py::test_a_dead_server",
            "tests/trainer/test_vllm.py::test_a_server_that_hangs_is_given_up_after_the_time_out",
        ),
    ),
    Promise(
        30,
        "SIGTERM, Ctrl-C and SIGUSR1 in any phase leave a checkpoint.",
        "3 signals in each phase",
        (f"{FAULTS}signals.py::test_a_signal_in_any_phase",),
    ),
    Promise(
        31,
        "Saves in the background do not stop training, and are never named before they are on the disk.",
        "stall <= 5 % of a step",
        (
            f"{FAULTS}async.py::test_kill_at_every_system_call_of_a_save_in_the_background",
            f"{FAULTS}async.py::test_training_does_not_wait_and_nothing_that_it_changes_is_written",
            f"{FAULTS}async.py::test_every_checkpoint_has_the_bits_of_one_that_training_waited_for",
        ),
        short="the stall is measured by benchmarks/checkpoint.py, whose figures are in long_runs.md",
    ),
    Promise(
        32,
        "Saving and verifying cost little more than writing.",
        "save <= 2 x a raw write; verify >= 1 GB/s per core",
        (),
        short="measured by benchmarks/checkpoint.py (figures in long_runs.md), not by a test: no timed assertions",
    ),
    Promise(
        33,
        "Nothing grows over a long run.",
        "24 h: memory < 1 %, files and children constant",
        (f"{FAULTS}disk.py::test_a_longer_run_goes_on_and_metrics_have_no_line_twice",),
        reached="{soak}",
        short="`make soak` runs for an hour, not for a day",
    ),
    Promise(
        34,
        "Training learns: rewards rise, and gradients are not silently 0.",
        "19 of 20 seeds",
        (f"{FAULTS}exact.py::test_resume_at_every_safe_point_is_exact",),
        reached="{learning}",
    ),
)  # fmt: skip
