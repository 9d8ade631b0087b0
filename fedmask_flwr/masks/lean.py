"""torch's optimisers without torch's compiler, whose import takes nearly as long as torch's own.

A client process lives for one message and compiles nothing, yet the first optimiser that is made, and its first
step, import the compiler: to mark methods as not to be compiled, and where a graph would end. The numbers are the
same bit for bit; networks that a user compiles stay compiled.
"""

from __future__ import annotations

import inspect
import sys

import torch
from torch.optim import Optimizer


class Adam(torch.optim.Adam):
    """torch's Adam."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.Adam.step))


class SGD(torch.optim.SGD):
    """torch's SGD."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.SGD.step))


def keep_compiler_out() -> None:
    """Let this process make optimisers without importing the compiler; where it is there already, nothing changes.

    Where another torch names the mark otherwise, it goes on importing.
    """
    if "torch._dynamo" in sys.modules:
        return
    for name in ("add_param_group", "load_state_dict", "state_dict", "zero_grad"):
        method = inspect.unwrap(getattr(Optimizer, name))
        setattr(method, "__dynamo_disable", method)
