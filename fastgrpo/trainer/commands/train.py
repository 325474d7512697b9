"""`fastgrpo train`: reads the options and refuses what cannot be meant before torch is imported, then runs the job."""

import os
import time
from collections.abc import Sequence

from fastgrpo.trainer.options.inputs import check_inputs
from fastgrpo.trainer.options.opening import check_folder, is_first
from fastgrpo.trainer.options.settings import SettingsError, describe, fail, parse_train
from fastgrpo.trainer.output.rundir import RunDirError

STARTED = time.time()


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 if training had to stop, 2 for options that cannot be meant, 130 after Ctrl-C."""
    try:
        config = parse_train(arguments)
        check_inputs(config)
        check_folder(config)
    except (SettingsError, RunDirError) as error:
        return fail(error)
    if is_first():
        print(describe(config))
        print("loading torch and transformers ...", flush=True)
    os.umask(0o077)  # a run holds prompts and completions of its owner
    from fastgrpo.trainer.run import run_job

    return run_job(config, STARTED)
