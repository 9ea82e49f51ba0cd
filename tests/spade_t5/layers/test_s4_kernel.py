"""S4's kernel against the dense complex system of the paper, built here from the 64 x 64 HiPPO-LegS matrices."""

import numpy as np
import pytest
import torch
from torch import Tensor

from spade_t5.layers.s4_kernel import kernel_by_doubling, legs_dplr, s4_kernel
from spade_t5.layers.ssm import S4

F64 = torch.float64
N = 64


def legs_matrices() -> tuple[np.ndarray, np.ndarray]:
    A = np.zeros((N, N))
    for n in range(N):
        for k in range(N):
            if n > k:
                A[n, k] = -np.sqrt((2 * n + 1) * (2 * k + 1))
            elif n == k:
                A[n, k] = -(n + 1)
    return A, np.sqrt(2.0 * np.arange(N) + 1.0)


def eigenvectors() -> np.ndarray:
    """V of A = V (Lambda - p p*) V*, columns of negative frequency first, phases such that V* P > 0."""
    A, _ = legs_matrices()
    P = np.sqrt(np.arange(N) + 0.5)
    eigenvalues, V = np.linalg.eig(A + np.outer(P, P))
    V = V[:, np.argsort(eigenvalues.imag)]
    p = V.conj().T @ P
    return V * (p / np.abs(p))


def dense_kernel(dt: float, c_half: np.ndarray, length: int) -> np.ndarray:
    """K_j = 2 Re(c (V* Abar^j Bbar)_half) with the bilinear Abar and Bbar of the real LegS system."""
    A, B = legs_matrices()
    identity = np.eye(N)
    Abar = np.linalg.solve(identity - dt / 2 * A, identity + dt / 2 * A)
    state = np.linalg.solve(identity - dt / 2 * A, dt * B)
    V_half = eigenvectors()[:, : N // 2]
    kernel = np.empty(length)
    for j in range(length):
        kernel[j] = 2.0 * (c_half @ (V_half.conj().T @ state)).real
        state = Abar @ state
    return kernel


def double_s4(d_model: int, dt_min: float = 1e-3, dt_max: float = 0.1) -> S4:
    mixer = S4(d_model, dt_min=dt_min, dt_max=dt_max).double()
    mixer.init_parameters(torch.Generator().manual_seed(0))
    return mixer


@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 500, 2000])
def test_equals_the_dense_formula_on_both_sides(length: int) -> None:
    mixer = double_s4(3)
    kernel = mixer.ssm_kernel(length)
    assert kernel.shape == (2, 3, length)
    c = torch.view_as_complex(mixer.C.detach()).numpy()
    for side in range(2):
        for channel in range(3):
            expected = dense_kernel(float(mixer.log_dt[channel].exp()), c[side, channel], length)
            error = np.abs(kernel[side, channel].detach().numpy() - expected).max()
            assert error <= 1e-6 * np.abs(expected).max(), (side, channel, error)


def test_float32_parameters_give_the_same_kernel_to_their_precision() -> None:
    exact = double_s4(4)
    stored = S4(4, dt_min=1e-3, dt_max=0.1)
    stored.load_state_dict(exact.state_dict())
    expected, actual = exact.ssm_kernel(1000), stored.ssm_kernel(1000)
    assert (actual - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_normal_plus_low_rank_form_is_legs() -> None:
    eigenvalues, p, b = (x.numpy() for x in legs_dplr(N))
    A, B = legs_matrices()
    V = eigenvectors()[:, : N // 2]
    # The other half is the complex conjugate, so the real part of one half is half of the whole.
    normal = 2.0 * (V @ np.diag(eigenvalues) @ V.conj().T).real
    P = 2.0 * (V @ p).real
    np.testing.assert_allclose(normal - np.outer(P, P), A, rtol=0, atol=1e-10)
    np.testing.assert_allclose(2.0 * (V @ b).real, B, rtol=0, atol=1e-11)
    np.testing.assert_allclose(eigenvalues.real, -0.5)
    assert (eigenvalues.imag < 0).all()


def test_doubling_equals_repeated_multiplication() -> None:
    generator = torch.Generator().manual_seed(0)
    transition = 0.3 * torch.randn(2, 5, 5, generator=generator, dtype=F64)
    column = torch.randn(2, 5, generator=generator, dtype=F64)
    rows = torch.randn(3, 2, 5, generator=generator, dtype=F64)
    for length in range(1, 40):
        state, expected = column, []
        for _ in range(length):
            expected.append(torch.einsum("sdn,dn->sd", rows, state))
            state = torch.einsum("dnm,dm->dn", transition, state)
        torch.testing.assert_close(kernel_by_doubling(transition, column, rows, length), torch.stack(expected, dim=-1))


def test_gradcheck_in_every_parameter() -> None:
    """A small system of the same form: every parameter has an exact gradient."""
    generator = torch.Generator().manual_seed(0)
    eigenvalues, p, b = legs_dplr(4)
    A = torch.stack((torch.log(-eigenvalues.real), eigenvalues.imag), dim=-1)

    def per_channel(x: Tensor) -> Tensor:
        return (x + 0.1 * torch.randn(2, *x.shape, generator=generator, dtype=F64)).requires_grad_()

    log_dt = torch.tensor([-3.0, -1.0], dtype=F64, requires_grad=True)
    C = torch.randn(2, 2, 2, 2, generator=generator, dtype=F64, requires_grad=True)
    tensors = (log_dt, per_channel(A), per_channel(torch.view_as_real(p)), per_channel(torch.view_as_real(b)), C)
    assert torch.autograd.gradcheck(lambda *x: s4_kernel(*x, 11), tensors)


def test_kernel_does_not_depend_on_a_maximal_length() -> None:
    """The first lags of a long kernel are the short kernel: nothing is wrapped, truncated or rescaled by the length."""
    mixer = double_s4(3, dt_min=1e-4, dt_max=2e-4)
    long = mixer.ssm_kernel(5000)
    for length in (1, 100, 1025, 4096):
        short = mixer.ssm_kernel(length)
        assert (long[:, :, :length] - short).abs().max() <= 1e-12 * short.abs().max()
    assert long[:, :, 4096:].abs().max() > 1e-3 * long.abs().max()


def test_conjugate_half_is_not_forgotten() -> None:
    """Summing over one of each conjugate pair only, the error of the released code, gives another kernel altogether."""
    mixer = double_s4(1)
    c = torch.view_as_complex(mixer.C.detach()).numpy()[0, 0]
    right = dense_kernel(float(mixer.log_dt.exp()), c, 50)
    kernel = mixer.ssm_kernel(50)[0, 0].detach().numpy()
    assert np.abs(kernel - right).max() < 1e-6 * np.abs(right).max()
    assert np.abs(kernel - right / 2).max() > 0.1 * np.abs(right).max()
