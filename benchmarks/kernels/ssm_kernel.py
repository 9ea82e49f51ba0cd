"""Generation of the convolution kernels: LegS by dense powers against the Cauchy form of S4, S4D against the full Vandermonde matrix.

The peers are what S4's code falls back to without its CUDA extension, in complex64: the Cauchy kernel by broadcasting (S4, arXiv
2111.00396) and the Vandermonde product (S4D, arXiv 2206.11893). Their constants are prepared outside of the timing: the nodes, and
the output vector corrected for the length. Only the forward pass is timed, as for a frozen layer: the peers' backward passes
need more memory than many machines have.

Letters: S sides, D channels, N d_state, M = N / 2 pairs, L lags, F = L / 2 + 1 frequencies.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spade_t5.benchmarks.kernels.cases import OURS, Benchmark, Case, Check, Plan, Work, Workload
from spade_t5.layers.ssm import S4, S4D, SSMMixer

_DT_RANGE: dict[str, Any] = {"dt_min": 1e-3, "dt_max": 1e-1}
_MAX_ROUNDS = 5


def cases(plan: Plan) -> Iterator[Case]:
    """Both systems at the first length of the plan."""
    length = plan.lengths[0]
    for mixer_class, peer, peer_name in ((S4, _cauchy, "cauchy"), (S4D, _vandermonde, "vandermonde")):
        contenders: dict[str, Callable[[], Workload]] = {
            OURS: partial(_workload, plan, mixer_class, _own, length),
            peer_name: partial(_workload, plan, mixer_class, peer, length),
        }
        yield Case(
            name=f"{mixer_class.__name__}, {length} lags",
            group=f"kernel of {mixer_class.__name__}",
            length=length,
            work=Work(forward_bytes=4.0 * 2 * plan.ssm_channels * length),
            contenders=contenders,
            shape={"channels": plan.ssm_channels, "d_state": plan.d_state, "lags": length, "sides": 2},
            max_rounds=_MAX_ROUNDS,
        )


def checks(plan: Plan) -> Iterator[Check]:
    """Ours against the peers' formulas in complex128."""
    for mixer_class, peer, trained in ((S4, _cauchy_exact, ()), (S4D, _vandermonde_exact, ("log_dt", "A", "C"))):
        build = partial(_workload, plan, mixer_class, length=plan.check_length, channels=4, trained=trained)
        yield Check(name=mixer_class.__name__, ours=partial(build, _own), exact=partial(build, peer))


_Generator = Callable[[], Tensor]


def _workload(
    plan: Plan,
    mixer_class: type[SSMMixer],
    make: Callable[[SSMMixer, int], _Generator],
    length: int,
    *,
    channels: int | None = None,
    trained: tuple[str, ...] = (),
) -> Workload:
    torch.manual_seed(0)
    mixer = mixer_class(
        channels or plan.ssm_channels,
        d_state=plan.d_state,
        training_mode="full" if trained else "frozen",
        **_DT_RANGE,
    )
    generate = make(mixer.to(plan.device), length)
    dkernel = torch.randn(2, mixer.d_model, length, generator=torch.Generator().manual_seed(1)).to(plan.device)
    # The Cauchy form trains C corrected for the length in the place of C: S4's gradients are not compared.
    leaves = tuple(parameter for name, parameter in mixer.named_parameters() if name in trained)
    return Workload(forward=generate, leaves=leaves, gradients=(dkernel,))


def _own(mixer: SSMMixer, length: int) -> _Generator:
    return lambda: mixer.ssm_kernel(length).float()


def _vandermonde(mixer: SSMMixer, length: int, dtype: torch.dtype = torch.float32) -> _Generator:
    assert isinstance(mixer, S4D)
    j = torch.arange(length, device=mixer.D.device, dtype=dtype)

    def generate() -> Tensor:
        A_DM = torch.complex(-mixer.A[..., 0].to(dtype).exp(), mixer.A[..., 1].to(dtype))
        step_DM = mixer.log_dt.to(dtype).exp()[:, None] * A_DM
        weight_SDM = torch.view_as_complex(mixer.C.to(dtype)) * (torch.exp(step_DM) - 1.0) / A_DM
        powers_DML = torch.exp(step_DM[:, :, None] * j)
        return 2.0 * torch.einsum("sdm,dml->sdl", weight_SDM, powers_DML).real

    return generate


def _vandermonde_exact(mixer: SSMMixer, length: int) -> _Generator:
    return _vandermonde(mixer, length, torch.float64)


def _cauchy(mixer: SSMMixer, length: int, dtype: torch.dtype = torch.float32) -> _Generator:
    """K's transform at the L-th roots of unity by Cauchy sums over all N eigenvalues and Woodbury's identity.

    K(w) = 2 / (1 + w) (c R b - c R p (1 + p* R p)^-1 p* R b),   R = (g / dt - Lambda)^-1,   g = 2 (1 - w) / (1 + w)
    """
    assert isinstance(mixer, S4)
    c_SDM = _corrected_output(mixer, length).to(torch.promote_types(dtype, torch.complex64))
    k = torch.arange(length // 2 + 1, dtype=torch.float64)
    # The root -1 has no finite node; a point next to it serves, as in S4's code.
    w = torch.exp(-2j * torch.pi * k / length)
    w = torch.where((1.0 + w).abs() < 1e-6, -1.0 + 1e-6j, w)
    nodes_F = (2.0 * (1.0 - w) / (1.0 + w)).to(mixer.D.device, c_SDM.dtype)
    factor_F = (2.0 / (1.0 + w)).to(nodes_F)

    def generate() -> Tensor:
        dt_D1 = mixer.log_dt.to(dtype).exp()[:, None]
        A_DM = torch.complex(-mixer.A[..., 0].to(dtype).exp(), mixer.A[..., 1].to(dtype))
        p_DM, b_DM = (torch.view_as_complex(x.to(dtype)) for x in (mixer.P, mixer.B))
        left_CDM = torch.cat((c_SDM, p_DM.conj()[None]))
        right_2DM = torch.stack((b_DM, p_DM))
        residues = left_CDM[:, None] * right_2DM * dt_D1  # (S + 1, 2, D, M)
        poles_DM = A_DM * dt_D1
        residues, poles_DN = (torch.cat((x, x.conj()), dim=-1) for x in (residues, poles_DM))
        matrix = residues[..., None] / (nodes_F - poles_DN[..., None])  # (S + 1, 2, D, N, F)
        sums_C2DF = matrix.sum(dim=-2)
        cb, cp, pb, pp = sums_C2DF[:-1, 0], sums_C2DF[:-1, 1], sums_C2DF[-1, 0], sums_C2DF[-1, 1]
        return torch.fft.irfft(factor_F * (cb - cp * pb / (1.0 + pp)), n=length)

    return generate


def _cauchy_exact(mixer: SSMMixer, length: int) -> _Generator:
    return _cauchy(mixer, length, torch.float64)


@torch.no_grad()
def _corrected_output(mixer: S4, length: int) -> Tensor:
    """C (I - Abar^L), complex128 (S, D, M): the sum over L lags is then the whole generating function."""
    A_DM = torch.complex(-mixer.A[..., 0].double().exp(), mixer.A[..., 1].double())
    p_DM, c_SDM = (torch.view_as_complex(x.double()) for x in (mixer.P, mixer.C))
    A_DN, p_DN, c_SDN = (torch.cat((x, x.conj()), dim=-1) for x in (A_DM, p_DM, c_SDM))
    half_DNN = (
        0.5
        * mixer.log_dt.double().exp()[:, None, None]
        * (torch.diag_embed(A_DN) - p_DN[:, :, None] * p_DN[:, None, :].conj())
    )
    identity = torch.eye(A_DN.shape[1], dtype=A_DN.dtype, device=A_DN.device)
    power_DNN = torch.linalg.matrix_power(torch.linalg.solve(identity - half_DNN, identity + half_DNN), length)
    return (c_SDN - torch.einsum("sdn,dnm->sdm", c_SDN, power_DNN))[..., : A_DM.shape[1]]


BENCHMARK = Benchmark(checks=checks, cases=cases)
