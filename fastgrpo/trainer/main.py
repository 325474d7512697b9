"""`fastgrpo train`: reads the options and claims the output folder before torch is imported, then runs the job."""

import time
from collections.abc import Sequence

from fastgrpo.trainer.rundir import RunDirError, claim
from fastgrpo.trainer.settings import SettingsError, describe, fail, parse_train, to_yaml

STARTED = time.time()


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code: 0, 2 for options that cannot be meant, 130 after Ctrl-C."""
    try:
        config = parse_train(arguments)
        out = claim(config.output_dir, config.job, to_yaml(config), config.overwrite)
    except (SettingsError, RunDirError) as error:
        return fail(error)
    print(describe(config))
    print(f"everything goes to {out}/; loading torch and transformers ...", flush=True)
    from fastgrpo.trainer.run import run_job

    return run_job(config, out, STARTED)
