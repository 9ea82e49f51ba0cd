"""The convolution of a frozen S4 layer, as the layer runs it: its kernel is cached and only the input has a gradient."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spade_t5.benchmarks.kernels.cases import (
    OURS,
    Benchmark,
    Case,
    Check,
    Plan,
    Work,
    Workload,
    document_ids,
    doubled,
    leaf,
    plan_for,
    random_tensors,
)
from spade_t5.kernels.ssm_conv import (
    ChunkedSystem,
    chunk_tokens,
    kernel_spectrum,
    ssm_conv,
    ssm_conv_chunked,
    ssm_conv_naive,
)
from spade_t5.layers.ssm import S4, S4D, SSMMixer

_DT_RANGE: dict[str, Any] = {"dt_min": 1e-3, "dt_max": 1e-1}


def cases(plan: Plan) -> Iterator[Case]:
    """Every length, unpacked and packed."""
    for length in plan.lengths:
        for document_tokens in (None, plan.document_tokens):
            group = "S4 frozen" + ("" if document_tokens is None else ", packed")
            build = partial(_workload, plan, plan.tokens // length, length, document_tokens)
            contenders: dict[str, Callable[[], Workload]] = {OURS: partial(build, _layer)}
            if plan.device == "cuda":
                contenders["torch-fft"] = partial(build, _own_fft)
            if document_tokens is None:
                contenders["plain-fft"] = partial(build, _plain_fft)
            tensor = plan.tokens * plan.d_model * plan.dtype.itemsize
            yield Case(
                name=f"{group}, length {length}",
                group=group,
                length=length,
                work=Work(forward_bytes=2 * tensor, backward_bytes=2 * tensor),
                contenders=contenders,
                shape={
                    "rows": plan.tokens // length,
                    "length": length,
                    "d_model": plan.d_model,
                    "d_state": plan.d_state,
                    "document_tokens": document_tokens,
                },
            )


def checks(plan: Plan) -> Iterator[Check]:
    """S4 and S4D, with documents whose edges fall anywhere."""
    for mixer_class in (S4, S4D):
        for document_tokens in (None, 37):
            build = partial(_workload, plan, 2, plan.check_length, document_tokens, mixer_class=mixer_class)
            yield Check(
                name=mixer_class.__name__ + ("" if document_tokens is None else ", packed"),
                ours=partial(build, _layer),
                exact=partial(build, _naive, is_double=True),
            )


def tuning_workloads() -> dict[str, Callable[[], Workload]]:
    """Dense and diagonal systems, each class of length, packed and not, both widths of the inputs."""
    plan = plan_for("cuda", is_quick=False)
    found: dict[str, Callable[[], Workload]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for mixer_class in (S4, S4D):
            for length in (4096, 512):
                for document_tokens in (None, plan.document_tokens):
                    name = f"{mixer_class.__name__}/{length}/{'packed' if document_tokens else 'unpacked'}/{dtype}"
                    found[name] = partial(
                        _workload,
                        plan,
                        plan.tokens // length,
                        length,
                        document_tokens,
                        _layer,
                        mixer_class=mixer_class,
                        dtype=dtype,
                    )
        for mixer_class in (S4, S4D):
            found[f"{mixer_class.__name__}/trained/{dtype}"] = partial(_trained, plan, mixer_class, dtype)
    return found


_Convolution = Callable[[Tensor], Tensor]


def _workload(
    plan: Plan,
    rows: int,
    length: int,
    document_tokens: int | None,
    make: Callable[[SSMMixer, int, Tensor | None], _Convolution],
    *,
    mixer_class: type[SSMMixer] = S4,
    is_double: bool = False,
    dtype: torch.dtype | None = None,
) -> Workload:
    u, dy = random_tensors(plan, *2 * ((rows, length, plan.d_model),), dtype=dtype)
    torch.manual_seed(0)
    mixer = mixer_class(plan.d_model, d_state=plan.d_state, **_DT_RANGE).to(plan.device)
    segment_ids = None
    if document_tokens is not None:
        segment_ids = document_ids(rows, length, document_tokens, plan.device)
    (u,) = doubled(u) if is_double else (leaf(u),)
    convolve = make(mixer, length, segment_ids)
    return Workload(forward=lambda: convolve(u), leaves=(u,), gradients=(dy.to(u.dtype),))


def _trained(plan: Plan, mixer_class: type[SSMMixer], dtype: torch.dtype) -> Workload:
    """The convolution alone with gradients to the system's matrices, as the model gets them when its SSM trains."""
    length = 4096
    u, dy = random_tensors(plan, *2 * ((plan.tokens // length, length, plan.d_model),), dtype=dtype)
    mixer = mixer_class(plan.d_model, d_state=plan.d_state, **_DT_RANGE).to(u.device)
    with torch.no_grad():
        made = mixer.chunked_system(chunk_tokens(length, u.device))
    assert made is not None
    system = ChunkedSystem(*(leaf(x) for x in made))
    u = leaf(u)
    return Workload(forward=lambda: ssm_conv_chunked(u, system), leaves=(u, *system), gradients=(dy,))


def _layer(mixer: SSMMixer, length: int, segment_ids: Tensor | None) -> _Convolution:
    return lambda u: mixer(u, segment_ids)


@torch.no_grad()
def _naive(mixer: SSMMixer, length: int, segment_ids: Tensor | None) -> _Convolution:
    kernel, skip = mixer.ssm_kernel(length), mixer.D.double()
    return lambda u: ssm_conv_naive(u, kernel, skip, segment_ids)


@torch.no_grad()
def _own_fft(mixer: SSMMixer, length: int, segment_ids: Tensor | None) -> _Convolution:
    """The path of devices without a kernel."""
    kernel, skip = mixer.ssm_kernel(length).float(), mixer.D.detach()
    spectrum = kernel_spectrum(kernel, skip, length) if segment_ids is None else None
    return lambda u: ssm_conv(u, kernel, skip, segment_ids=segment_ids, ssm_kernel_f=spectrum, backend="torch")


@torch.no_grad()
def _plain_fft(mixer: SSMMixer, length: int, segment_ids: Tensor | None) -> _Convolution:
    """The usual few lines: one transform of all channels, twice the length, differentiated by autograd; spectrum cached."""
    kernel, skip = mixer.ssm_kernel(length).float(), mixer.D.detach()
    circle = torch.cat((kernel[0], kernel[1].flip(-1)), dim=-1)
    spectrum = torch.fft.rfft(circle)

    def convolve(u: Tensor) -> Tensor:
        u_f = torch.fft.rfft(u.float().transpose(1, 2), n=2 * length)
        y = torch.fft.irfft(u_f * spectrum, n=2 * length)[..., :length].transpose(1, 2)
        return (y + u * skip).to(u.dtype)

    return convolve


BENCHMARK = Benchmark(checks=checks, cases=cases, tuning=tuning_workloads)
