"""What is published of the accelerators that runs meet: peak arithmetic, memory and links.

Peaks are of dense matrix products, without the doubling of structured sparsity that data sheets print first. Memory is what the driver
reports. Links are the sum of both directions over all of a device's links to its neighbours in the node; None where it has only PCIe.
Sources: the makers' data sheets (NVIDIA A100, H100, H200, HGX B200, L4, L40S, A10, Ada and Ampere architecture papers; AMD Instinct MI300X).
"""

import re
from dataclasses import dataclass

from spade_t5.errors import ConfigError
from spade_t5.messages import shown

_TERA, _GIGA, _MIB = 1e12, 1e9, 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Accelerator:
    """One kind of device."""

    key: str
    """How a command line names it."""
    name: str
    """How it is printed."""
    pattern: str
    """Regular expression of the whole name that `torch.cuda.get_device_name` gives."""
    bf16_flops: float
    """Peak in bfloat16 with sums in float32, FLOP/s."""
    tf32_flops: float
    """Peak of float32 products whose factors are rounded to TF32, FLOP/s."""
    fp32_flops: float
    """Peak in float32, FLOP/s."""
    memory_bytes: int
    """Memory of the device."""
    memory_bandwidth: float
    """Of that memory, bytes/s."""
    link_bandwidth: float | None
    """To its neighbours in the node, bytes/s."""
    architecture: str
    """Key of the launch tables of our kernels."""

    def peak_flops(self, precision: str) -> float:
        """Peak of the matrix products of a training precision: fp32, bf16_autocast or bf16; of PyTorch's own float32, which is not TF32."""
        return self.fp32_flops if precision == "fp32" else self.bf16_flops


def _device(
    key: str,
    name: str,
    pattern: str,
    tera: tuple[float, float, float],
    memory_mib: int,
    giga: tuple[float, float | None],
    architecture: str,
) -> Accelerator:
    """Peaks in TFLOP/s (bf16, tf32, fp32), memory in MiB, bandwidths in GB/s (memory, links)."""
    bf16, tf32, fp32 = tera
    memory, link = giga
    return Accelerator(
        key=key,
        name=name,
        pattern=pattern,
        bf16_flops=bf16 * _TERA,
        tf32_flops=tf32 * _TERA,
        fp32_flops=fp32 * _TERA,
        memory_bytes=memory_mib * _MIB,
        memory_bandwidth=memory * _GIGA,
        link_bandwidth=None if link is None else link * _GIGA,
        architecture=architecture,
    )


_A100 = (312.0, 156.0, 19.5)
_H100 = (989.4, 494.7, 66.9)
ACCELERATORS = (
    _device("a100-40", "A100 40 GB", r"(NVIDIA )?A100-(SXM4|PCIE)-40GB", _A100, 40_960, (1_555, 600), "sm_80"),
    _device("a100-80", "A100 80 GB", r"(NVIDIA )?A100(-SXM4-80GB| 80GB PCIe)", _A100, 81_920, (2_039, 600), "sm_80"),
    _device("h100", "H100 SXM", r"(NVIDIA )?H100 80GB HBM3|NVIDIA H100 SXM.*", _H100, 81_559, (3_350, 900), "sm_90"),
    _device("h100-pcie", "H100 PCIe", r"(NVIDIA )?H100 PCIe", (756.0, 378.0, 51.0), 81_559, (2_000, 600), "sm_90"),
    _device("h200", "H200", r"(NVIDIA )?H200", _H100, 143_771, (4_800, 900), "sm_90"),
    _device("b200", "B200", r"(NVIDIA )?B200", (2_250.0, 1_125.0, 75.0), 183_359, (7_700, 1_800), "sm_100"),
    _device("l40s", "L40S", r"(NVIDIA )?L40S", (362.05, 183.0, 91.6), 46_068, (864, None), "sm_89"),
    _device("l4", "L4", r"(NVIDIA )?L4", (121.0, 60.0, 30.3), 23_034, (300, None), "sm_89"),
    _device("a10", "A10", r"(NVIDIA )?A10", (125.0, 62.5, 31.2), 23_028, (600, None), "sm_86"),
    _device("rtx4090", "RTX 4090", r"NVIDIA GeForce RTX 4090", (165.2, 82.6, 82.6), 24_564, (1_008, None), "sm_89"),
    _device("rtx3090", "RTX 3090", r"NVIDIA GeForce RTX 3090", (71.0, 35.6, 35.6), 24_576, (936, None), "sm_86"),
    _device("mi300x", "MI300X", r"AMD Instinct MI300X.*", (1_307.4, 653.7, 163.4), 196_592, (5_300, 896), "gfx942"),
)


def find_accelerator(key: str) -> Accelerator:
    """The accelerator of this key.

    Raises:
        ConfigError: it is not known; the message names those that are.
    """
    for accelerator in ACCELERATORS:
        if accelerator.key == key.lower():
            return accelerator
    known = ", ".join(accelerator.key for accelerator in ACCELERATORS)
    raise ConfigError(f"--gpu: {shown(key)} is not known; give one of {known}")


def match_accelerator(device_name: str) -> Accelerator | None:
    """The accelerator that calls itself by this name; None: it is not known.

    >>> match_accelerator("NVIDIA H100 80GB HBM3").key
    'h100'
    >>> match_accelerator("NVIDIA GeForce RTX 4090 Laptop GPU") is None
    True

    Args:
        device_name: `torch.cuda.get_device_name()`.
    """
    return next((one for one in ACCELERATORS if re.fullmatch(one.pattern, device_name)), None)


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak of a device's matrix products in FLOP/s; None: the device is not known.

    Args:
        device_name: `torch.cuda.get_device_name()`.
        precision: of `TrainingConfig`: fp32, bf16_autocast or bf16.
    """
    accelerator = match_accelerator(device_name)
    return None if accelerator is None else accelerator.peak_flops(precision)
