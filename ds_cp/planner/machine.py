"""GPUs and links. Speeds are what was reached, not what is on the data sheet; `assumed` ones were not measured by us."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU. TFLOP/s in bf16, calibrated on the figures that docs/planner.md names."""

    name: str
    memory_gib: float
    """What the device reports as its total."""
    bandwidth_tb: float
    mlp: float = 650.0
    projections: float = 480.0
    head: float = 560.0
    attention: tuple[tuple[int, tuple[float, float]], ...] = ((64, (560.0, 560.0)), (128, (665.0, 605.0)), (256, (770.0, 378.0)))
    """By head size, the next larger counts: forward and backward."""

    def attention_speed(self, head_size: int) -> tuple[float, float]:
        return next((speed for size, speed in self.attention if head_size <= size), self.attention[-1][1])


@dataclass(frozen=True)
class Link:
    """One direction of one GPU's link, or of all of a host's where they share one."""

    name: str
    gb_per_s: float
    latency_us: float
    shared: bool = False
    assumed: bool = True


GPUS = (
    Gpu("h100", memory_gib=79.18, bandwidth_tb=3.35),
    Gpu("h200", memory_gib=139.8, bandwidth_tb=4.8),
)

INSIDE = (
    Link("nvlink", 220.0, 150.0, assumed=False),  # hops of 268 MB between two H100s: 204 to 240 GB/s; 67 MB: 120 to 170
    Link("pcie-5", 45.0, 30.0),
    Link("pcie-4", 22.0, 30.0),
)
BETWEEN = (
    Link("infiniband-400g", 42.0, 40.0),
    Link("infiniband-200g", 21.0, 40.0),
    Link("ethernet-400g", 42.0, 80.0, shared=True),
    Link("ethernet-100g", 10.5, 80.0, shared=True),
    Link("ethernet-25g", 2.6, 100.0, shared=True),
)

PEAKS = (
    *(
        ("H100 PCIe", 756e12),
        ("H100 NVL", 835e12),
        ("H200 NVL", 835e12),
        ("H100", 989e12),
        ("H200", 989e12),
        ("H800", 989e12),
        ("GH200", 989e12),
    ),
    *(("A100", 312e12), ("A800", 312e12), ("B200", 2250e12), ("L40S", 362e12), ("RTX 4090", 165e12)),
)
"""Dense bf16 FLOP/s of data sheets, by what a device's name holds; the first that fits counts."""

HOST_GB_PER_S = 50.0
"""Between a GPU and pinned host memory (assumed: PCIe 5 x16)."""
HOST_ADAM = 100e9
"""Bytes a second that an optimizer on the host gets out of a host's memory (assumed)."""
RESERVE_GIB = 2.5
"""CUDA's context, NCCL's buffers, and what an allocator cannot hand out (assumed)."""


@dataclass(frozen=True)
class Machine:
    """The GPUs of a job."""

    gpus: int
    per_host: int
    gpu: Gpu
    inside: Link
    between: Link
    host_memory_gib: float

    @property
    def hosts(self) -> int:
        return self.gpus // self.per_host

    @property
    def memory(self) -> float:
        """Bytes of a GPU that a training step may have."""
        return (self.gpu.memory_gib - RESERVE_GIB) * GIB


def peak(device: str) -> float | None:
    """bf16 FLOP/s of a device by the name that it reports; None for one that is not known."""
    return next((flops for name, flops in PEAKS if name in device and "GB200" not in device), None)


def build(gpus: int, per_host: int, gpu: str, memory_gib: float, inside: str, between: str, host_memory_gib: float) -> Machine:
    """From what the shell is given.

    Args:
        memory_gib: of one GPU; 0: what the named one has. inside, between: a name, or GB/s of one GPU's link in one direction.

    Raises:
        ValueError: an unknown name, or GPUs that do not fill hosts.
    """
    per_host = min(per_host or 8, gpus)
    if gpus % per_host:
        raise ValueError(f"--gpus {gpus}: not a multiple of the {per_host} GPUs of a host; give --gpus-per-host")
    found = next((one for one in GPUS if one.name == gpu), None)
    if found is None:
        raise ValueError(
            f"--gpu {gpu}: unknown; use one of {', '.join(one.name for one in GPUS)}, with --gpu-memory for another size"
        )
    if memory_gib:
        found = Gpu(found.name, memory_gib, found.bandwidth_tb)
    return Machine(gpus, per_host, found, _link("inside", inside, INSIDE), _link("between", between, BETWEEN), host_memory_gib)


def _link(option: str, given: str, named: tuple[Link, ...]) -> Link:
    found = next((link for link in named if link.name == given), None)
    if found is not None:
        return found
    try:
        speed = float(given)
    except ValueError:
        speed = 0.0
    if not 0 < speed < float("inf"):
        names = ", ".join(link.name for link in named)
        raise ValueError(f"--{option} {given}: neither GB/s of one GPU in one direction nor one of {names}")
    return Link(f"{speed:g} GB/s", speed, named[0].latency_us)
