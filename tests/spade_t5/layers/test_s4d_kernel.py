"""S4D's kernel against its definition, term by term."""

import math

import pytest
import torch

from spade_t5.layers.s4d_kernel import s4d_kernel, s4d_lin
from spade_t5.layers.ssm import S4D

F64 = torch.float64


@pytest.mark.parametrize("length", [1, 2, 3, 63, 500])
def test_equals_zero_order_hold_written_out(length: int) -> None:
    mixer = S4D(3, dt_min=1e-3, dt_max=0.1).double()
    mixer.init_parameters(torch.Generator().manual_seed(0))
    eigenvalues = torch.complex(-mixer.A[..., 0].exp(), mixer.A[..., 1])
    dt = mixer.log_dt.exp()[:, None]
    Abar = torch.exp(dt * eigenvalues)
    Bbar = (Abar - 1.0) / eigenvalues
    C = torch.view_as_complex(mixer.C)
    expected = torch.stack([2.0 * (C * Bbar * Abar**j).sum(dim=-1).real for j in range(length)], dim=-1)
    actual = mixer.ssm_kernel(length)
    assert actual.shape == (2, 3, length)
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max()


def test_eigenvalues_are_those_of_s4d_lin() -> None:
    expected = torch.tensor([-0.5 + 0j, -0.5 + 1j * math.pi, -0.5 + 2j * math.pi], dtype=torch.complex128)
    torch.testing.assert_close(s4d_lin(6), expected)


def test_gradcheck_in_every_parameter() -> None:
    generator = torch.Generator().manual_seed(0)
    log_dt = torch.tensor([-3.0, -1.0], dtype=F64, requires_grad=True)
    A = torch.randn(2, 3, 2, generator=generator, dtype=F64, requires_grad=True)
    C = torch.randn(2, 2, 3, 2, generator=generator, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: s4d_kernel(*x, 11), (log_dt, A, C))
