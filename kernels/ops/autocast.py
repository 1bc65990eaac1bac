"""What torch.autocast asks of code that it does not look into, as autograd functions are."""

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype to which torch.autocast casts the operands of products on this device, None where it is off."""
    # torch has no autocast of the meta device, and raises where it is asked
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)
