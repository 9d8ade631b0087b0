"""What the machine can give: memory against what a round needs, torch's threads, CUDA."""

from __future__ import annotations

import math
import os

from fedmask_flwr import cgroup
from fedmask_flwr.show import human_bytes

from .base import Asked, Finding, check, fail, ok, warn
from .trial import trial

__all__ = ["PER_PARAMETER", "memory", "threads"]

# Bytes of a round, above what any method takes: 69 measured with DrawStep, 66 with KLMS, 49 with DeltaStep, 47 with
# DeltaMask, 37 with FedPM (benchmarks/device_memory.py).
PER_PARAMETER = 70


@check("torch", limit=250.0)
def threads(asked: Asked) -> Finding:
    """torch runs here, its threads fit the processors, and CUDA is there where it is asked for."""
    got = trial(asked)["torch"]
    if "error" in got:
        return fail(
            f"torch does not run: {got['error']}",
            "install the wheel for this processor: on arm64 the newest are CUDA builds, and a signal 4 (illegal "
            "instruction) means that this processor is too old for the wheel",
        )
    flat = asked.flat()
    wanted, device = int(flat.get("threads", 1)), str(flat.get("device", "auto"))
    quota, have = cgroup.limits().processors, cgroup.cores()
    share = f", a quota of {quota:g} of them" if quota < have else ""
    omp = os.environ.get("OMP_NUM_THREADS", "")
    cuda = f"CUDA on {got['cuda']}" if got["cuda"] else "no CUDA" + (" seen" if got["built"] else " in this build")
    seen = (
        f"torch {got['version']}: {wanted} thread{'s' if wanted > 1 else ''} a client (run config), {have} cores"
        f"{share}, OMP_NUM_THREADS {omp or 'unset'}, {cuda}"
    )
    if device.startswith("cuda") and not got["cuda"]:
        return fail(
            f"{seen}; device is {device}", "set device to cpu or auto, or install a driver and a CUDA build"
        )
    room = max(1, math.ceil(min(quota, have)))
    if wanted > room:
        return warn(
            seen, f"set threads to {room} in the run config: more threads than processors wait for each other"
        )
    if omp.isdecimal() and int(omp) > room:
        return warn(
            seen, f"set OMP_NUM_THREADS={room} in the service's environment, not above the processors it has"
        )
    if not omp and min(quota, have) < (os.cpu_count() or 1):
        return warn(
            seen,
            f"set OMP_NUM_THREADS={room} in the service's environment: until the run config is read, torch and "
            f"numpy start a thread for each of {os.cpu_count()} processors, not only for those allowed",
        )
    return ok(seen)


@check("memory", limit=250.0)
def memory(asked: Asked) -> Finding:
    """Memory that is left, within the limits of the container, against what a client needs in a round."""
    bound = cgroup.limits()
    machine = cgroup.free_memory()
    left = min(bound.left, machine)
    said = f"{human_bytes(left)} left" if left < math.inf else "nobody tells how much memory is left"
    if bound.memory < math.inf:
        said += f" of a limit of {human_bytes(bound.memory)}"
    stages = trial(asked)
    client, network = stages["client"], stages["network"]
    if "error" in client:
        return fail(f"{said}; {client['error']}", "a signal 9 is a process killed for memory: allow it 700 MB")
    # Pages of libraries can be read again, at a price in time; what the process wrote cannot.
    kept, mapped, what = client["anonymous"], client["mapped"], "imports (name model and data for the rest)"
    if "error" not in network:
        weights, layers = PER_PARAMETER * network["parameters"], network["activations"]
        kept += weights + layers
        what = (
            f"imports {human_bytes(client['anonymous'])}, {network['parameters']} parameters "
            f"{human_bytes(weights)}, "
            f"batches {human_bytes(layers)}"
        )
    seen = f"{said}; a client needs about {human_bytes(kept)} ({what}), and {human_bytes(mapped)} of libraries"
    if kept > left:
        return fail(
            seen,
            "raise the container's limit (mem_limit, MemoryMax), end other programs, add swap, or take a smaller "
            "batch-size or model: the kernel kills what does not fit",
        )
    if kept + mapped > left:
        return warn(seen, "libraries will be read from disk again and again: raise the limit")
    return ok(seen)
