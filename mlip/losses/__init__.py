"""The losses by their config names; a new loss is one file and one line here."""

from __future__ import annotations

import torch.nn as nn

from mlip.losses.category import Category
from mlip.losses.global_contrastive import GlobalContrastive
from mlip.losses.local_alignment import LocalAlignment
from mlip.losses.matching import Matching
from mlip.losses.swapping import Swapping

LOSSES: dict[str, type[nn.Module]] = {
    "global_contrastive": GlobalContrastive,
    "local_alignment": LocalAlignment,
    "category": Category,
    "matching": Matching,
    "swapping": Swapping,
}
