"""What a GPU offers one block of threads, for choosing tile maps; no Triton here."""

from __future__ import annotations

from typing import NamedTuple

import torch

# bytes of shared memory that one block may use, by compute capability (CUDA programming guide,
# "technical specifications per compute capability"); all others have 99 KiB at least
SHARED_MEMORY = {(8, 0): 166912, (8, 7): 166912, (9, 0): 232448, (10, 0): 232448, (10, 3): 232448}
SHARED_MEMORY_OTHERS = 101376
TENSOR_MEMORY = (10, 11)  # major capabilities
TENSOR_MEMORY_COLUMNS = 512  # PTX ISA, tcgen05: of a multiprocessor, 128 lanes of 32 bits each


class Chip(NamedTuple):
    """A GPU as tile maps see it."""

    shared: int  # bytes of shared memory that one block may use
    processors: int
    has_tensor_memory: bool = False  # products add up in TENSOR_MEMORY_COLUMNS, not in registers


def chip_of(capability: tuple[int, int], processors: int) -> Chip:
    """The chip of a compute capability."""
    shared = SHARED_MEMORY.get(capability, SHARED_MEMORY_OTHERS)
    return Chip(shared, processors, capability[0] in TENSOR_MEMORY)


def chip_facts(device: torch.device) -> Chip:
    """The chip of a device."""
    if device.type != "cuda":  # the interpreter: tilings of an H100, hardly any parallelism
        return Chip(SHARED_MEMORY[9, 0], 1)
    properties = torch.cuda.get_device_properties(device)
    return chip_of((properties.major, properties.minor), properties.multi_processor_count)
