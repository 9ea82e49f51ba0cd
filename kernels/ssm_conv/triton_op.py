"""The chunked convolution by Triton, as operators that torch.compile, checkpointing and autocast take as one node each.

Keeps u for the backward pass only where the system trains; its states are then computed again.

Shapes: B rows, D channels, L tokens, C chunks of T tokens a row, X = B C columns, S sides, N states a side.
"""

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from spade_t5.kernels.launch import LaunchConfig, launch_config, must_upcast, operator
from spade_t5.kernels.ssm_conv.chunk_documents import ChunkDocuments, chunk_documents
from spade_t5.kernels.ssm_conv.system import ChunkedSystem
from spade_t5.kernels.ssm_conv.triton_kernels import (
    ssm_chunk_dlocal_kernel,
    ssm_chunk_dstates_kernel,
    ssm_chunk_dtransition_dense_kernel,
    ssm_chunk_dtransition_diagonal_kernel,
    ssm_chunk_outputs_kernel,
    ssm_chunk_recurrence_dense_kernel,
    ssm_chunk_recurrence_diagonal_kernel,
    ssm_chunk_states_kernel,
)

_MIN_DOT_SIDE = 16
_MIN_DENSE_CLASS = 64


def ssm_conv_chunked_triton(u_BLD: Tensor, system: ChunkedSystem, segment_ids: Tensor | None = None) -> Tensor:
    """Y = M U + P s within each document; arguments and result as of `ssm_conv_chunked`, unchecked."""
    documents = (None, None, None) if segment_ids is None else chunk_documents(segment_ids, system.chunk_tokens)
    return _forward(u_BLD.transpose(1, 2), *system, *documents).transpose(1, 2)


@operator("ssm_conv_chunked")
def _forward(
    u_BDL: Tensor,
    local: Tensor,
    w: Tensor,
    p: Tensor,
    transition: Tensor,
    piece: Tensor | None,
    num_pieces: Tensor | None,
    is_linked: Tensor | None,
) -> Tensor:
    run = _Pass(ChunkedSystem(local, w, p, transition), _documents(piece, num_pieces, is_linked), is_adjoint=False)
    u_BDL = _tokens_adjacent(u_BDL)
    return run.outputs(u_BDL, run.states(u_BDL))


@_forward.register_fake
def _(u_BDL: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(u_BDL, memory_format=torch.contiguous_format)


@operator("ssm_conv_chunked_backward_input")
def _backward_input(
    dy_BDL: Tensor,
    local: Tensor,
    w: Tensor,
    p: Tensor,
    transition: Tensor,
    piece: Tensor | None,
    num_pieces: Tensor | None,
    is_linked: Tensor | None,
) -> Tensor:
    run = _Pass(ChunkedSystem(local, w, p, transition), _documents(piece, num_pieces, is_linked), is_adjoint=True)
    dy_BDL = _tokens_adjacent(dy_BDL)
    return run.outputs(dy_BDL, run.states(dy_BDL))


@_backward_input.register_fake
def _(dy_BDL: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(dy_BDL, memory_format=torch.contiguous_format)


@operator("ssm_conv_chunked_backward")
def _backward(
    dy_BDL: Tensor,
    u_BDL: Tensor,
    local: Tensor,
    w: Tensor,
    p: Tensor,
    transition: Tensor,
    piece: Tensor | None,
    num_pieces: Tensor | None,
    is_linked: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    system, documents = ChunkedSystem(local, w, p, transition), _documents(piece, num_pieces, is_linked)
    dy_BDL, u_BDL = _tokens_adjacent(dy_BDL), _tokens_adjacent(u_BDL)
    adjoint = _Pass(system, documents, is_adjoint=True)
    dadded = adjoint.states(dy_BDL)
    du_BDL = adjoint.outputs(dy_BDL, dadded)
    states = _Pass(system, documents, is_adjoint=False).states(u_BDL)
    return (
        du_BDL,
        _dlocal(dy_BDL, u_BDL, system, documents),
        _dstates(dadded, u_BDL, system, documents, sends=True),
        _dstates(states, dy_BDL, system, documents, sends=False).transpose(1, 2).contiguous(),
        _dtransition(dadded, states, system, documents),
    )


@_backward.register_fake
def _(dy_BDL: Tensor, *others: Any) -> tuple[Tensor, ...]:
    """One gradient for each of u, local, w, p and transition."""
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in others[:5])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u_BDL, *rest = inputs
    ctx.trains_system = any(ctx.needs_input_grad[1:5])
    ctx.save_for_backward(u_BDL if ctx.trains_system else None, *rest)


def _gradients(ctx: Any, dy_BDL: Tensor) -> tuple[Tensor | None, ...]:
    u_BDL, *rest = ctx.saved_tensors
    if ctx.trains_system:
        return *_backward(dy_BDL, u_BDL, *rest), None, None, None
    return _backward_input(dy_BDL, *rest), None, None, None, None, None, None, None


_forward.register_autograd(_gradients, setup_context=_setup_context)


class _States(NamedTuple):
    """States that reach the chunks, in what the dots multiply; in half precision each column is in a unit of its own."""

    states_DXR: Tensor
    unscale_DXS: Tensor | None
    unscale_tokens_DX: Tensor | None


class _Pass:
    """The forward pass, or its adjoint: the same kernels on transposed matrices, both sides turned round."""

    def __init__(self, system: ChunkedSystem, documents: ChunkDocuments | None, *, is_adjoint: bool) -> None:
        self.system, self.documents, self.is_adjoint = system, documents, is_adjoint
        self.local, self.w, self.p = system.local, system.w, system.p
        if is_adjoint:
            self.local, self.w, self.p = (x.transpose(1, 2) for x in (system.local, system.p, system.w))

    def states(self, x_BDL: Tensor) -> _States:
        """From the tokens of all chunks to the states that reach each."""
        batch, d_model, _ = x_BDL.shape
        tokens, num_sides, num_states = self.system.chunk_tokens, self.system.num_sides, self.system.num_states
        num_chunks = triton.cdiv(x_BDL.shape[2], tokens)
        num_columns = batch * num_chunks
        is_scaled = x_BDL.dtype != torch.float32
        added_DXR, unscale_tokens_DX = (
            x_BDL.new_empty(d_model, num_columns, size, dtype=torch.float32) for size in (num_sides * num_states, 1)
        )
        w = self.w.to(_operand_dtype(x_BDL))
        config = _fitted("states", x_BDL, BLOCK_T=tokens, BLOCK_N=num_states)
        num_tiles = triton.cdiv(num_columns, config["BLOCK_X"]) * triton.cdiv(num_states, config["BLOCK_N"])
        ssm_chunk_states_kernel[num_tiles, d_model](
            x_BDL,
            w,
            *_masks(self.documents),
            added_DXR,
            unscale_tokens_DX if is_scaled else None,
            stride_u_b=x_BDL.stride(0),
            stride_u_d=x_BDL.stride(1),
            stride_w_d=w.stride(0),
            stride_w_r=w.stride(1),
            stride_w_t=w.stride(2),
            L=x_BDL.shape[2],
            num_chunks=num_chunks,
            num_columns=num_columns,
            N=num_states,
            T=tokens,
            SIDES=num_sides,
            REVERSED=self.is_adjoint,
            PACKED=self.documents is not None,
            SCALED=is_scaled,
            **config,
        )

        states_DXR = torch.empty_like(added_DXR, dtype=_operand_dtype(x_BDL))
        unscale_DXS = added_DXR.new_empty(d_model, num_columns, num_sides) if is_scaled else None
        transition = self.system.transition
        if self.system.is_dense and not self.is_adjoint:
            transition = transition.transpose(1, 2)
        kernel, variant = ssm_chunk_recurrence_diagonal_kernel, "recurrence/diagonal"
        block = triton.next_power_of_2(num_states // 2)
        if self.system.is_dense:
            block = triton.next_power_of_2(num_states)
            kernel, variant = ssm_chunk_recurrence_dense_kernel, f"recurrence/dense/{max(block, _MIN_DENSE_CLASS)}"
        kernel[d_model, num_sides, batch](
            added_DXR,
            transition.contiguous(),
            None if self.documents is None else self.documents.num_pieces,
            None if self.documents is None else self.documents.is_linked,
            states_DXR,
            unscale_DXS,
            num_chunks=num_chunks,
            num_columns=num_columns,
            N=num_states,
            SIDES=num_sides,
            REVERSED=self.is_adjoint,
            PACKED=self.documents is not None,
            SCALED=is_scaled,
            BLOCK_N=block,
            **launch_config("ssm_conv", variant, x_BDL.device),
        )
        return _States(states_DXR, unscale_DXS, unscale_tokens_DX if is_scaled else None)

    def outputs(self, x_BDL: Tensor, states: _States) -> Tensor:
        """From tokens and states to outputs, (B, D, L)."""
        batch, d_model, length = x_BDL.shape
        tokens, num_states = self.system.chunk_tokens, self.system.num_states
        num_chunks = triton.cdiv(length, tokens)
        num_columns = batch * num_chunks
        local, p = (matrix.to(_operand_dtype(x_BDL)) for matrix in (self.local, self.p))
        y_BDL = torch.empty_like(x_BDL, memory_format=torch.contiguous_format)
        config = _fitted("outputs", x_BDL, BLOCK_T=tokens, BLOCK_J=tokens, BLOCK_N=num_states)
        ssm_chunk_outputs_kernel[triton.cdiv(num_columns, config["BLOCK_X"]) * (tokens // config["BLOCK_T"]), d_model](
            x_BDL,
            local,
            p,
            states.states_DXR,
            states.unscale_tokens_DX,
            states.unscale_DXS,
            *_masks(self.documents),
            y_BDL,
            stride_u_b=x_BDL.stride(0),
            stride_u_d=x_BDL.stride(1),
            stride_y_b=y_BDL.stride(0),
            stride_y_d=y_BDL.stride(1),
            stride_local_d=local.stride(0),
            stride_local_i=local.stride(1),
            stride_local_j=local.stride(2),
            stride_p_d=p.stride(0),
            stride_p_t=p.stride(1),
            stride_p_r=p.stride(2),
            L=length,
            num_chunks=num_chunks,
            num_columns=num_columns,
            N=num_states,
            T=tokens,
            SIDES=self.system.num_sides,
            REVERSED=self.is_adjoint,
            PACKED=self.documents is not None,
            SCALED=x_BDL.dtype != torch.float32,
            **config,
        )
        return y_BDL


def _dlocal(dy_BDL: Tensor, u_BDL: Tensor, system: ChunkedSystem, documents: ChunkDocuments | None) -> Tensor:
    batch, d_model, length = u_BDL.shape
    tokens = system.chunk_tokens
    num_chunks = triton.cdiv(length, tokens)
    dlocal = torch.empty_like(system.local, dtype=torch.float32, memory_format=torch.contiguous_format)
    config = _fitted("dlocal", u_BDL, BLOCK_I=tokens, BLOCK_J=tokens)
    ssm_chunk_dlocal_kernel[tokens // config["BLOCK_I"] * (tokens // config["BLOCK_J"]), d_model](
        dy_BDL,
        u_BDL,
        *_masks(documents),
        dlocal,
        stride_dy_b=dy_BDL.stride(0),
        stride_dy_d=dy_BDL.stride(1),
        stride_u_b=u_BDL.stride(0),
        stride_u_d=u_BDL.stride(1),
        L=length,
        num_chunks=num_chunks,
        num_columns=batch * num_chunks,
        T=tokens,
        PACKED=documents is not None,
        UPCAST=must_upcast(u_BDL),
        **config,
    )
    return dlocal


def _dstates(
    states: _States, x_BDL: Tensor, system: ChunkedSystem, documents: ChunkDocuments | None, *, sends: bool
) -> Tensor:
    """Gradient of W from dS and u, with `sends`; else that of P' from s and dy."""
    batch, d_model, length = x_BDL.shape
    tokens, num_sides, num_states = system.chunk_tokens, system.num_sides, system.num_states
    num_chunks = triton.cdiv(length, tokens)
    out_DRT = torch.empty_like(system.w, dtype=torch.float32, memory_format=torch.contiguous_format)
    config = _fitted("dstates", x_BDL, BLOCK_T=tokens, BLOCK_N=num_states)
    grid = (triton.cdiv(num_states, config["BLOCK_N"]) * (tokens // config["BLOCK_T"]), d_model, num_sides)
    ssm_chunk_dstates_kernel[grid](
        x_BDL,
        states.states_DXR,
        states.unscale_DXS,
        None if states.unscale_DXS is None else states.unscale_DXS.amax(dim=1),
        *_masks(documents),
        out_DRT,
        stride_x_b=x_BDL.stride(0),
        stride_x_d=x_BDL.stride(1),
        L=length,
        num_chunks=num_chunks,
        num_columns=batch * num_chunks,
        N=num_states,
        T=tokens,
        SIDES=num_sides,
        SENDS=sends,
        PACKED=documents is not None,
        SCALED=states.unscale_DXS is not None,
        UPCAST=must_upcast(x_BDL),
        **config,
    )
    return out_DRT


def _dtransition(dadded: _States, states: _States, system: ChunkedSystem, documents: ChunkDocuments | None) -> Tensor:
    d_model, num_columns, _ = states.states_DXR.shape
    num_states = system.num_states
    out = torch.empty_like(system.transition, dtype=torch.float32, memory_format=torch.contiguous_format)
    config = dict(launch_config("ssm_conv", f"dtransition/{system.transition_class}", out.device))
    kernel = ssm_chunk_dtransition_diagonal_kernel
    num_tiles = triton.cdiv(num_states // 2, config["BLOCK_N"])
    if system.is_dense:
        kernel = ssm_chunk_dtransition_dense_kernel
        num_tiles = triton.cdiv(num_states, config["BLOCK_N"]) * triton.cdiv(num_states, config["BLOCK_M"])
    kernel[num_tiles, d_model](
        dadded.states_DXR,
        states.states_DXR,
        dadded.unscale_DXS,
        states.unscale_DXS,
        None if documents is None else documents.num_pieces,
        out,
        num_columns=num_columns,
        N=num_states,
        SIDES=system.num_sides,
        PACKED=documents is not None,
        SCALED=states.unscale_DXS is not None,
        **config,
    )
    return out


def _documents(piece: Tensor | None, num_pieces: Tensor | None, is_linked: Tensor | None) -> ChunkDocuments | None:
    if piece is None or num_pieces is None or is_linked is None:
        return None
    return ChunkDocuments(piece.contiguous(), num_pieces.contiguous(), is_linked.contiguous())


def _masks(documents: ChunkDocuments | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if documents is None else (documents.piece, documents.num_pieces)


def _tokens_adjacent(x_BDL: Tensor) -> Tensor:
    return x_BDL if x_BDL.stride(2) == 1 else x_BDL.contiguous()


def _operand_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype == torch.float32 else torch.float16


def _fitted(kernel: str, x: Tensor, **sizes: int) -> LaunchConfig:
    """Launch configuration with blocks no larger than what they divide."""
    precision = "float" if x.dtype == torch.float32 else "half"
    config = dict(launch_config("ssm_conv", f"{kernel}/{precision}", x.device))
    for name, size in sizes.items():
        config[name] = min(config[name], max(_MIN_DOT_SIDE, triton.next_power_of_2(size)))
    return config
