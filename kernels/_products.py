"""A library matrix product of narrow matrices whose result is float32."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in float32, of operands that may be bfloat16; added to `out`, in place, where given.

    Shapes:  a [R, K], b [K, C], of one dtype; out [R, C] float32
    Returns: [R, C] float32, which is `out` where given
    """
    if a.dtype != torch.float32 and not a.is_cuda:  # out_dtype is for CUDA alone
        a, b = a.float(), b.float()
    if a.dtype == torch.float32:
        return a @ b if out is None else out.addmm_(a, b)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    # given twice, as what is added and as where to: no copy is made
    return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
