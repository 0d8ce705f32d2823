"""What a layer does between its products, each with its gradient written by hand: fewer passes over memory than autograd's.

Without a gradient to come they are plain functions, without autograd's cost a call.
"""

import torch
import torch.nn.functional as F


def _apply(function: type[torch.autograd.Function], *inputs):
    """``function.apply(*inputs)``, without a graph where nothing needs a gradient."""
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in inputs):
        return function.apply(*inputs)
    return function.forward(None, *inputs)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, in fp32 inside, returned in x's dtype."""
    return _apply(_RMSNorm, x, weight, eps)


class _RMSNorm(torch.autograd.Function):
    """Keeps x and a number a row."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        if ctx is not None:
            ctx.save_for_backward(x, weight, scale)
        return (x * scale).to(x.dtype).mul_(weight)  # fp32 inside: scale is

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        x, weight, scale = ctx.saved_tensors
        normed = x * scale
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = (gradient * normed.to(x.dtype)).flatten(0, -2).sum(0)
        for_normed = (gradient * weight).float()
        along = torch.linalg.vecdot(for_normed, normed).unsqueeze(-1).div_(x.size(-1))
        for_x = for_normed.sub_(normed.mul_(along)).mul_(scale)
        return for_x.to(x.dtype), for_weight, None


def rotate(x: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotary embedding, the first half of the last dimension paired with the second. [s, b, heads, d] -> the same shape.

    ``angles`` fp32 [s or 1, b or 1, 1, d], whose halves are the same.
    """
    half = angles[..., : angles.size(-1) // 2]
    return rotate_by(x, half.cos().to(x.dtype), half.sin().to(x.dtype))


def rotate_by(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """``rotate`` with cosines and sines [..., d / 2] of the angles, in x's dtype."""
    return _apply(_Rotate, x, cos, sin)


class _Rotate(torch.autograd.Function):
    """Keeps cosines and sines, which all heads share."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        if ctx is not None:
            ctx.save_for_backward(cos, sin)
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        (a, b), (first, second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=second).addcmul_(a, sin)
        return out

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        cos, sin = ctx.saved_tensors
        return _Rotate.forward(None, gradient, cos, -sin), None, None


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up of x = [gate, up]: [..., 2 f] -> [..., f]."""
    return _apply(_SwiGLU, x)


class _SwiGLU(torch.autograd.Function):
    """Keeps x alone for the backward, half of what autograd would keep."""

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        if ctx is not None:
            ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        x = ctx.saved_tensors[0]
        out = torch.empty_like(x)
        (gate, up), (d_gate, d_up) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
        torch.mul(gradient, F.silu(gate), out=d_up)
        torch.ops.aten.silu_backward(gradient * up, gate, grad_input=d_gate)
        return out
