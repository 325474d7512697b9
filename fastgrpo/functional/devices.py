"""A device by the name that a user gave, or an error that says what there is."""

import torch


def pick_device(name: str, option: str = "--device") -> torch.device:
    """`auto` is a GPU if there is one.

    Raises:
        ValueError: No such device here; the text names the option, the rule and what this machine has.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"{option} must be auto, cpu, cuda or cuda:N, got {name!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        why = f"torch {torch.__version__} finds {count or 'no'} GPU{'s' * (count > 1)} here"
        raise ValueError(f"{option} {name} cannot be used: {why}")
    return device
