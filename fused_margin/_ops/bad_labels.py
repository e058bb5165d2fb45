"""Reports a label outside [0, num_classes): at once on CPU, without a host sync, so one call later, on CUDA."""

import torch

_flags: dict[torch.device, torch.Tensor] = {}
_debug = False


def set_debug(enabled: bool) -> None:
    """With ``enabled``, every CUDA call waits for its kernels and reports a bad label itself, not the next call.

    Costs a host synchronisation per call. CPU calls always report at once.
    """
    global _debug
    _debug = bool(enabled)


def flag(device: torch.device) -> torch.Tensor:
    """Where kernels report: one int64 the host and the device both see, 0 while all is well."""
    if device.type != "cuda":
        return torch.zeros(1, dtype=torch.int64, device="cpu")
    if device not in _flags:  # setdefault: host threads that find none at the same time use the same one
        _flags.setdefault(device, torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=True))
    reported = _flags[device]
    raise_if_set(reported, "in an earlier call (fused_margin.set_debug(True) reports it in its own call)")
    return reported


def check(reported: torch.Tensor, device: torch.device, classes: int) -> None:
    """After the kernel that looks at the labels."""
    if device.type == "cuda":
        if not _debug:
            return
        torch.cuda.synchronize(device)
    raise_if_set(reported, f"for {classes} classes")


def raise_if_set(reported: torch.Tensor, where: str) -> None:
    value = int(reported)
    if value:
        reported.zero_()
        raise error(value if value < 0 else value - 1, where)


def error(label: int, where: str) -> ValueError:
    return ValueError(f"labels: expected values in [0, num_classes) or ignore_index, got {label} {where}")
