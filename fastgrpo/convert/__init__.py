"""From another trainer's configuration to an `Objective`: every option is mapped or refused by name."""

from fastgrpo.convert.trl import objective_from_trl
from fastgrpo.convert.verl import objective_from_verl

__all__ = ["objective_from_trl", "objective_from_verl"]
