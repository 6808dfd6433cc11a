"""What a GPU offers one block of threads, for choosing tile maps; no Triton here."""

from __future__ import annotations

import torch

# bytes of shared memory that one block may use, by compute capability (CUDA programming guide,
# "technical specifications per compute capability"); all others have 99 KiB
SHARED_MEMORY = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
SHARED_MEMORY_OTHERS = 101376


def chip_facts(device: torch.device) -> tuple[int, int]:
    """(bytes of shared memory a block may use, number of multiprocessors)."""
    if device.type != "cuda":  # the interpreter: tilings of an H100, hardly any parallelism
        return SHARED_MEMORY[9, 0], 1
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    return SHARED_MEMORY.get(capability, SHARED_MEMORY_OTHERS), properties.multi_processor_count
