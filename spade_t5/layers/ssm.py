"""Global mixers: linear state-space models that carry information along the whole document in linear time.

S4 and S4D as SPADE uses them: only the linear system y = K * u + D u, two-sided in an encoder, without activation or
output projection, frozen by default while the gradient still passes to the input. A new mixer is a subclass of
`SSMMixer` under a name of its own.

What the parameters need from their surroundings is kept here: they are real, stay in float32 when the model is cast to
half precision (a memory of a thousand tokens is a decay of 0.999 a token, which bfloat16 rounds to 1), and are marked
`_is_ssm` for the optimizer.
"""

import functools
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from spade_t5 import ops
from spade_t5.layers.s4_kernel import legs_dplr, s4_kernel, s4_system
from spade_t5.layers.s4d_kernel import s4d_kernel, s4d_lin, s4d_system

TrainingMode = Literal["frozen", "output", "full"]

_logger = logging.getLogger(__name__)

GLOBAL_MIXERS: dict[str, type["SSMMixer"]] = {}

_Mixer = TypeVar("_Mixer", bound="type[SSMMixer]")


def register_mixer(name: str) -> Callable[[_Mixer], _Mixer]:
    """Class decorator that makes a mixer known as `global_mixer: name`.

    Args:
        name: not yet taken.

    Raises:
        ValueError: the name is taken.
    """

    def register(mixer: _Mixer) -> _Mixer:
        if name in GLOBAL_MIXERS:
            raise ValueError(f"global mixer {name!r} is {GLOBAL_MIXERS[name].__name__} already; choose another name")
        GLOBAL_MIXERS[name] = mixer
        return mixer

    return register


class SSMMixer(nn.Module, ABC):
    """A convolution with the impulse response of a linear system, the same for every document.

    A subclass declares its parameters with `_declare`, fills them in `init_parameters` and computes `ssm_kernel` from
    them.

    Args:
        d_model: channels, each with a system of its own.
        d_state: N, states per channel; even, as complex states come in conjugate pairs.
        dt_min: smallest initial step, in tokens: the slowest channel remembers about 1 / dt_min tokens.
        dt_max: largest initial step.
        bidirectional: look both ways, else back only.
        training_mode: "frozen": nothing trains; "output": C and D train; "full": everything trains.

    Raises:
        ValueError: an argument is out of range.
    """

    D: nn.Parameter
    log_dt: nn.Parameter

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        dt_min: float,
        dt_max: float,
        bidirectional: bool = True,
        training_mode: TrainingMode = "frozen",
    ) -> None:
        super().__init__()
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state={d_state} must be even and positive: states are stored as conjugate pairs")
        if not 0.0 < dt_min <= dt_max:
            raise ValueError(f"dt_min={dt_min}, dt_max={dt_max}: give 0 < dt_min <= dt_max, in tokens")
        if training_mode not in ("frozen", "output", "full"):
            raise ValueError(f"training_mode={training_mode!r} is unknown; use 'frozen', 'output' or 'full'")
        self.d_model, self.d_state = d_model, d_state
        self.dt_min, self.dt_max = dt_min, dt_max
        self.num_sides = 2 if bidirectional else 1
        self.training_mode = training_mode
        self._cache = _KernelCache()

    @abstractmethod
    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw the parameters anew, in place.

        Args:
            generator: on the CPU; None: the default one.
        """

    @abstractmethod
    def ssm_kernel(self, length: int) -> Tensor:
        """Impulse response for `length` lags: float64 (S, D, length); [0] from lag 0 on, [1] from lag -1 on."""

    def chunked_system(self, chunk_tokens: int) -> ops.ChunkedSystem | None:
        """The same system in chunks, skip included, for the kernels of a GPU.

        Args:
            chunk_tokens: T, a power of two.

        Returns:
            system in the dtype of D; None from a mixer that only knows its impulse response.
        """
        return None

    def forward(self, x_BLD: Tensor, segment_ids_BL: Tensor | None = None) -> Tensor:
        """y_t = sum_j k0[j] x_{t-j} + sum_j k1[j] x_{t+1+j} + D x_t within each document.

        Args:
            x_BLD: input.
            segment_ids_BL: 0 = padding, taken as 0; None: every row is one document.

        Returns:
            (B, L, D) in the dtype of the input, on Triton under autocast in that of autocast.
        """
        if ops.backend_in_use(device=x_BLD.device) == "triton":
            # As PyTorch's convolutions under autocast: in half precision the products run on tensor cores.
            if torch.is_autocast_enabled(x_BLD.device.type):
                x_BLD = x_BLD.to(torch.get_autocast_dtype(x_BLD.device.type))
            system = self._system_in_use(x_BLD)
            if system is not None:
                return ops.ssm_conv_chunked(x_BLD, system, segment_ids=segment_ids_BL)
            _say_once(f"{type(self).__name__} has no chunked system: its convolution runs on backend 'torch'")
            return self._convolve(x_BLD, segment_ids_BL, backend="torch")
        return self._convolve(x_BLD, segment_ids_BL, backend="auto")

    # Its sizes depend on the documents, and a frozen kernel is kept from one call to the next: nothing for a graph.
    @torch.compiler.disable
    def _convolve(self, x_BLD: Tensor, segment_ids_BL: Tensor | None, *, backend: str) -> Tensor:
        """By the impulse response."""
        length = x_BLD.shape[1]
        with torch.autocast(x_BLD.device.type, enabled=False):
            if self._is_training_any():
                kernel_SDL, spectrum_DF = self.ssm_kernel(length).to(self.D.dtype), None
            else:
                kernel_SDL, spectrum_DF = self._cache.lookup(self, length)
        if spectrum_DF is not None and (x_BLD.dtype == torch.float64) != (spectrum_DF.dtype == torch.complex128):
            spectrum_DF = None
        return ops.ssm_conv(
            x_BLD, kernel_SDL, self.D, segment_ids=segment_ids_BL, ssm_kernel_f=spectrum_DF, backend=backend
        )

    def _system_in_use(self, x_BLD: Tensor) -> ops.ChunkedSystem | None:
        """The chunked system for this input, kept while frozen; with the matrices that the kernels multiply."""
        chunk_tokens = ops.ssm_chunk_tokens(x_BLD.shape[1], x_BLD.device)
        with torch.autocast(x_BLD.device.type, enabled=False):
            if self._is_training_any():
                return self.chunked_system(chunk_tokens)
            key = (chunk_tokens, x_BLD.dtype.itemsize == 2)
            self._prepare_system(*key)
            return self._cache.systems[key]

    # torch.compile calls it while it traces and reads the cache as an input of the graph: no trace of how it is filled.
    @torch.compiler.assume_constant_result
    def _prepare_system(self, chunk_tokens: int, is_half: bool) -> bool:
        self._cache.add_system(self, chunk_tokens, is_half)
        return True

    def _is_training_any(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters(recurse=False))

    def extra_repr(self) -> str:
        """Sizes, for printing the model."""
        return f"{self.d_model}, d_state={self.d_state}, sides={self.num_sides}, training_mode={self.training_mode!r}"

    def reset_cache(self) -> None:
        """Forget what was made of the parameters, after a write into the `.data` of one: all other changes are noticed.

        A model that is compiled does not notice writes in place either; loading a state dict calls this by itself.
        """
        self._cache = _KernelCache()

    def _declare(self, **shapes: tuple[int, ...]) -> None:
        # A default dtype of bfloat16, which is how half-precision models are built, must not reach these parameters.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.empty(shape, dtype=dtype)))

    def _trains(self, name: str) -> bool:
        return self.training_mode == "full" or (self.training_mode == "output" and name in ("C", "D"))

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Take in a parameter, one that loading puts in the place of another included, and mark it."""
        super().register_parameter(name, param)
        registered = self._parameters[name]
        if registered is not None:
            registered.requires_grad_(self._trains(name))
        self._mark_parameters()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SSMMixer":
        def keep_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            is_narrowed = result.is_floating_point() and result.dtype.itemsize < torch.float32.itemsize
            return tensor.to(result.device, torch.float32) if is_narrowed else result

        super()._apply(keep_precision, recurse)
        self._mark_parameters()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.reset_cache()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._mark_parameters()

    def _mark_parameters(self) -> None:
        """Attributes of parameters do not survive copying."""
        for parameter in self.parameters(recurse=False):
            parameter._is_ssm = True  # type: ignore[attr-defined]
        self.reset_cache()

    @torch.no_grad()
    def stretch_steps(self, dt_min: float, dt_max: float) -> None:
        """Move the steps of all channels to another range, in place: each keeps its place between the ends, on a logarithmic scale.

            log dt' = log dt_min' + (log dt - log dt_min) (log dt_max' - log dt_min') / (log dt_max - log dt_min)

        A model that was drawn with the same seed in the new range has these steps. With a smaller `dt_min` slow channels remember longer and
        fast ones stay as they are, which fits a model for short inputs to long ones.

        Args:
            dt_min: smallest step of the new range, in tokens.
            dt_max: largest one.

        Raises:
            ValueError: the ends are not in order, or there is nothing to stretch: all steps were equal.
        """
        if not 0.0 < dt_min <= dt_max:
            raise ValueError(f"dt_min={dt_min}, dt_max={dt_max}: give 0 < dt_min <= dt_max, in tokens")
        if self.dt_min == self.dt_max:
            raise ValueError(f"dt_min and dt_max were both {self.dt_min}: equal steps have no places between two ends")
        place = (self.log_dt.double() - math.log(self.dt_min)) / (math.log(self.dt_max) - math.log(self.dt_min))
        self.log_dt.copy_(math.log(dt_min) + place * (math.log(dt_max) - math.log(dt_min)))
        self.dt_min, self.dt_max = dt_min, dt_max

    def _draw_log_dt(self, generator: torch.Generator | None) -> Tensor:
        uniform = torch.rand(self.d_model, generator=generator, dtype=torch.float64, device="cpu")
        return math.log(self.dt_min) + uniform * (math.log(self.dt_max) - math.log(self.dt_min))

    def _draw_outputs(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """C, complex standard normal (variance 1/2 + 1/2), and D, standard normal."""
        shape = (self.num_sides, self.d_model, self.d_state // 2, 2)
        C = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") * math.sqrt(0.5)
        return C, torch.randn(self.d_model, generator=generator, dtype=torch.float64, device="cpu")


@register_mixer("s4")
class S4(SSMMixer):
    """HiPPO-LegS with its rank-one correction (S4, arXiv 2111.00396), bilinear, one system per channel."""

    log_dt: nn.Parameter
    A: nn.Parameter
    P: nn.Parameter
    B: nn.Parameter
    C: nn.Parameter

    def __init__(self, d_model: int, **options: Any) -> None:
        super().__init__(d_model, **options)
        pairs = (self.d_model, self.d_state // 2, 2)
        self._declare(log_dt=(d_model,), A=pairs, P=pairs, B=pairs, C=(self.num_sides, *pairs), D=(d_model,))
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw dt, C and D anew and set A, P and B to LegS, in place; arguments as of `SSMMixer.init_parameters`."""
        eigenvalues, p, b = legs_dplr(self.d_state)
        self.log_dt.copy_(self._draw_log_dt(generator))
        self.A.copy_(_log_real_and_imaginary(eigenvalues))
        self.P.copy_(torch.view_as_real(p))
        self.B.copy_(torch.view_as_real(b))
        C, D = self._draw_outputs(generator)
        self.C.copy_(C)
        self.D.copy_(D)

    def ssm_kernel(self, length: int) -> Tensor:
        """As of `SSMMixer.ssm_kernel`."""
        return s4_kernel(self.log_dt, self.A, self.P, self.B, self.C, length)

    def chunked_system(self, chunk_tokens: int) -> ops.ChunkedSystem:
        """As of `SSMMixer.chunked_system`, with a dense transition."""
        return s4_system(self.log_dt, self.A, self.P, self.B, self.C, self.D, chunk_tokens)


@register_mixer("s4d")
class S4D(SSMMixer):
    """Diagonal state-space model with the eigenvalues of S4D-Lin (arXiv 2206.11893), discretised by zero-order hold."""

    log_dt: nn.Parameter
    A: nn.Parameter
    C: nn.Parameter

    def __init__(self, d_model: int, **options: Any) -> None:
        super().__init__(d_model, **options)
        pairs = (self.d_model, self.d_state // 2, 2)
        self._declare(log_dt=(d_model,), A=pairs, C=(self.num_sides, *pairs), D=(d_model,))
        self.init_parameters()

    @torch.no_grad()
    def init_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw dt, C and D anew and set A to S4D-Lin, in place; arguments as of `SSMMixer.init_parameters`."""
        self.log_dt.copy_(self._draw_log_dt(generator))
        self.A.copy_(_log_real_and_imaginary(s4d_lin(self.d_state)))
        C, D = self._draw_outputs(generator)
        self.C.copy_(C)
        self.D.copy_(D)

    def ssm_kernel(self, length: int) -> Tensor:
        """As of `SSMMixer.ssm_kernel`."""
        return s4d_kernel(self.log_dt, self.A, self.C, length)

    def chunked_system(self, chunk_tokens: int) -> ops.ChunkedSystem:
        """As of `SSMMixer.chunked_system`, with a diagonal transition."""
        return s4d_system(self.log_dt, self.A, self.C, self.D, chunk_tokens)


class _KernelCache:
    """What a frozen mixer convolves with: kernels and the transform of the one used last, or chunked systems.

    Kernels are made for lengths that are powers of two and cut: one serves many lengths, and the kernel of a length
    does not depend on which lengths came before. Entries hold as long as every parameter is the same object at the same
    version.
    """

    def __init__(self) -> None:
        self._forget(())

    def _forget(self, parameters: tuple[tuple[nn.Parameter, int], ...]) -> None:
        self.parameters = parameters
        self.kernels: dict[tuple[torch.device, int, torch.dtype], Tensor] = {}
        self.spectrum: tuple[tuple[torch.device, int, torch.dtype], Tensor] | None = None
        self.systems: dict[tuple[int, bool], ops.ChunkedSystem | None] = {}

    def lookup(self, mixer: SSMMixer, length: int) -> tuple[Tensor, Tensor]:
        """Kernel (S, D, length) and its transform."""
        self._follow(mixer)
        skip_D = mixer.D
        padded_length = 1 << (length - 1).bit_length()
        key = (skip_D.device, padded_length, skip_D.dtype)
        # What is made inside torch.inference_mode could not be used in training later on.
        with torch.inference_mode(False), torch.no_grad():
            if key not in self.kernels:
                self.kernels[key] = mixer.ssm_kernel(padded_length).to(skip_D.dtype)
            kernel_SDL = self.kernels[key][:, :, :length]
            spectrum_key = (skip_D.device, length, skip_D.dtype)
            if self.spectrum is None or self.spectrum[0] != spectrum_key:
                self.spectrum = (spectrum_key, ops.kernel_spectrum(kernel_SDL, skip_D.detach(), length))
            spectrum_DF = self.spectrum[1]
        return kernel_SDL, spectrum_DF

    def add_system(self, mixer: SSMMixer, chunk_tokens: int, is_half: bool) -> None:
        """Make the chunked system, its matrices in float16 for input in half precision; None if the mixer has none."""
        self._follow(mixer)
        key = (chunk_tokens, is_half)
        with torch.inference_mode(False), torch.no_grad():
            if key not in self.systems:
                system = mixer.chunked_system(chunk_tokens)
                self.systems[key] = system.half() if system is not None and is_half else system

    def _follow(self, mixer: SSMMixer) -> None:
        parameters = tuple((p, 0 if p.is_inference() else p._version) for p in mixer.parameters(recurse=False))
        if not self._are_current(parameters):
            self._forget(parameters)

    def _are_current(self, parameters: tuple[tuple[nn.Parameter, int], ...]) -> bool:
        return len(parameters) == len(self.parameters) and all(
            new is old and new_version == old_version
            for (new, new_version), (old, old_version) in zip(parameters, self.parameters, strict=True)
        )


# torch.compile must not trace the log.
@torch.compiler.assume_constant_result
@functools.cache
def _say_once(message: str) -> None:
    _logger.warning(message)


def _log_real_and_imaginary(eigenvalues: Tensor) -> Tensor:
    return torch.stack((torch.log(-eigenvalues.real), eigenvalues.imag), dim=-1)
