"""Devices by key and by the name that the driver gives."""

import pytest

from spade_t5.devices import ACCELERATORS, find_accelerator, match_accelerator, peak_flops
from spade_t5.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100 80GB PCIe", "a100-80"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA L40", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_names_of_the_driver(name: str, key: str | None) -> None:
    found = match_accelerator(name)
    assert (None if found is None else found.key) == key
    assert (peak_flops(name, "bf16") is None) == (key is None)


def test_keys_are_unique_and_an_unknown_one_names_them() -> None:
    keys = [accelerator.key for accelerator in ACCELERATORS]
    assert len(set(keys)) == len(keys)
    for key in keys:
        assert find_accelerator(key.upper()).key == key
    with pytest.raises(ConfigError, match=r"--gpu: 'h300' is not known; give one of a100-40, .*h100, .*mi300x"):
        find_accelerator("h300")


def test_float32_is_not_tf32() -> None:
    for accelerator in ACCELERATORS:
        assert accelerator.fp32_flops <= accelerator.tf32_flops <= accelerator.bf16_flops
        assert accelerator.peak_flops("fp32") == accelerator.fp32_flops
        assert accelerator.peak_flops("bf16_autocast") == accelerator.peak_flops("bf16") == accelerator.bf16_flops
