"""Where a figure was measured: versions, hardware, threads. Recorded with every result."""

import os
import platform
import shlex
import sys
from typing import Any

import torch

from quicksilver.version import __version__


def describe(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to know of the machine and the software."""
    import transformers

    return {
        "quicksilver": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "command": command_line(),
    }


def cpu_name() -> str:
    """Return the processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def command_line() -> str:
    """Return the command as typed, the program by its bare name."""
    if sys.orig_argv[1:2] == ["-m"]:
        return shlex.join(["python", *sys.orig_argv[1:]])
    return shlex.join([os.path.basename(sys.argv[0]), *sys.argv[1:]])
