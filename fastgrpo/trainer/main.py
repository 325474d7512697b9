"""`fastgrpo train`: reads the options and claims the output folder before torch is imported, then runs the job."""

import os
import time
from collections.abc import Sequence

from fastgrpo.trainer.opening import open_run
from fastgrpo.trainer.rundir import RunDirError
from fastgrpo.trainer.settings import SettingsError, describe, fail, parse_train

STARTED = time.time()


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, 1 if training had to stop, 2 for options that cannot be meant, 130 after Ctrl-C."""
    try:
        config = parse_train(arguments)
        os.umask(0o077)  # a run holds prompts and completions of its owner
        opened = open_run(config)
    except (SettingsError, RunDirError) as error:
        return fail(error)
    if opened.lock is not None:  # the first process, if there are several
        print(describe(config))
        print(
            f"everything goes to {opened.folder}/; loading torch and transformers ...", flush=True
        )
    from fastgrpo.trainer.run import run_job

    return run_job(config, opened, STARTED)
