"""The torch path of a CPU as torch.compile is to meet it: a call that it leaves alone.

On a CPU rows of weight 0 are dropped by their values, so a graph would hold for one mask, and its
tiles, Python loops, take it minutes. Imported while a call is compiled, and not before:
torch.compiler.disable imports the compiler, a second that nobody else should wait.
"""

from __future__ import annotations

import torch

from mlip.kernels.token_knowledge_patch.op import scores_by_torch

scores_by_torch_uncompiled = torch.compiler.disable(
    scores_by_torch,
    reason='the plain torch path of a CPU is not compiled; impl="triton" on a GPU is one graph',
)
