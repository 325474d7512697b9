"""From rewards to advantages: groups, process and turn rewards, GAE, shaping and filters."""

from fastgrpo.functional.group_advantage import GroupAdvantage, group_advantage

__all__ = ["GroupAdvantage", "group_advantage"]
