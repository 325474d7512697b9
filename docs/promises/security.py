"""Promises about hostile input, secrets and what is installed."""

from promises.promise import FAULTS, SECURITY, Promise

SAFETY = (
    Promise(
        35,
        "The package holds nothing that runs what it has read, and no way out to the network but a named one.",
        "0 uses; Bandit 0 high, each other finding with a reason",
        (
            f"{SECURITY}static.py::test_nothing_that_runs_what_was_read",
            f"{SECURITY}static.py::test_the_gate_sees_what_it_is_for",
            f"{SECURITY}static.py::test_models_are_read_without_code_of_theirs_and_without_a_hub",
            f"{SECURITY}static.py::test_bandit",
        ),
        short="CodeQL is not run; pip-audit only where it finds its database",
    ),
    Promise(
        36,
        "A hostile checkpoint, model or data file runs nothing, touches nothing outside, and is refused.",
        ">= 40; within 200 MB",
        (
            f"{SECURITY}checkpoints.py::test_refused_in_one_line_without_any_effect",
            f"{SECURITY}models.py::test_model_folders_are_refused_in_one_line",
            f"{SECURITY}models.py::test_data_files_are_refused_by_name",
            f"{SECURITY}models.py::test_chat_templates_run_in_transformers_sandbox",
            f"{SECURITY}models.py::test_code_and_servers_are_taken_from_the_command_line_only",
        ),
        short="a sparse file of terabytes is hashed to its end before it is refused",
    ),
    Promise(
        37,
        "A hostile completion runs nothing, escapes nowhere, and changes no other completion's score.",
        ">= 200; <= 1 s each",
        (
            f"{SECURITY}completions.py::test_every_reader_takes_every_text",
            f"{SECURITY}completions.py::test_scores_of_other_completions_do_not_change",
            f"{SECURITY}completions.py::test_math_verify_runs_no_code_and_survives_what_hangs_it",
            f"{SECURITY}completions.py::test_math_verify_on_the_whole_corpus",
            f"{SECURITY}completions.py::test_report_shows_them_as_text",
            f"{SECURITY}completions.py::test_terminal_is_not_steered",
            f"{SECURITY}completions.py::test_other_commands_do_not_steer_the_terminal_either",
        ),
        reached="303 texts",
        short="the library math-verify is given 3 s and 4 GB for a completion, then that one scores 0",
    ),
    Promise(
        38,
        "No command listens, and none connects to anything that the user has not named.",
        "0 sockets at import, help, build, doctor, training",
        (
            f"{SECURITY}network.py::test_importing_every_module",
            f"{SECURITY}network.py::test_help",
            f"{SECURITY}network.py::test_building_a_wheel",
            f"{SECURITY}network.py::test_training_with_report_and_checkpoints",
        ),
        short="several processes (torchrun) meet over TCP: torch.distributed's ports carry no authentication",
    ),
    Promise(
        39,
        "Secrets of the environment, of URLs and of error messages reach no file and no terminal.",
        "0 canaries",
        (
            f"{SECURITY}private.py::test_no_secret_of_the_environment_is_in_any_file",
            f"{SECURITY}private.py::test_no_secret_is_printed",
            f"{SECURITY}private.py::test_redaction",
            f"{SECURITY}private.py::test_no_option_takes_a_secret",
        ),
        short="what a reward function prints by itself goes to standard error as it is",
    ),
    Promise(
        40,
        "What a run leaves is its owner's alone; a cache that others can write to is not read.",
        "0700 and 0600 whatever the umask",
        (
            f"{SECURITY}private.py::test_files_are_private_whatever_the_umask",
            f"{FAULTS}damage.py::test_folders_and_files_are_private_whatever_the_umask",
            f"{SECURITY}checkpoints.py::test_a_base_model_of_another_is_not_loaded",
        ),
        short="Triton's own cache is Triton's",
    ),
    Promise(
        41,
        "Two dependencies, no code at install, the same wheel twice, a policy for reports.",
        "2 builds identical",
        (
            f"{SECURITY}supply.py::test_the_core_needs_torch_and_triton_only",
            f"{SECURITY}supply.py::test_nothing_runs_at_install_or_start_of_python",
            f"{SECURITY}supply.py::test_two_builds_are_the_same_bytes",
        ),
        short="not published yet: no hash-locked pipeline, attestations or SBOM; the source archive carries times",
    ),
)  # fmt: skip
