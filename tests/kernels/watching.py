"""Watches what kernels touch in Triton's interpreter, which runs one program after the other and
takes whatever lies at an address: on a GPU programs run at once, and memory ends.

Ours; compute-sanitizer's memcheck and racecheck ask the same of a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

NOBODY, SEVERAL = -1, -2  # in place of a program's number
# what a program may write where it has read or written itself. Other threads of it may have, so
# each has a barrier between, or the same thread on both sides
OWN_AGAIN = {
    # one tensor of pointers for both: each thread its own elements
    "_pair_bwd_patches_kernel": {"patch_grad_ptr"},
    "_context_bwd_patches_kernel": {"patch_grad_ptr"},
    "_max_bwd_patches_kernel": {"patch_grad_ptr"},
    # a row's sum goes through shared memory between
    "_context_turn_kernel": {"r_ptr", "g_ptr"},
    # a column's sum does, in each row block
    "_info_nce_fwd_kernel": {"column_max_ptr", "column_sum_ptr"},
}


class Launch:
    """The memory of one launch's tensors, and which program wrote and which read each piece of it.

    arguments: of the kernel, by name; a tensor's memory is all of its storage
    """

    def __init__(self, kernel: str, arguments: dict[str, Any]) -> None:
        self.program = 0
        self._kernel = kernel
        self._own_again = OWN_AGAIN.get(kernel, set())
        tensors = {n: x for n, x in arguments.items() if isinstance(x, torch.Tensor)}
        sizes: dict[int, int] = {}
        names: dict[int, set[str]] = {}
        for name, tensor in tensors.items():
            storage = tensor.untyped_storage()
            if storage.nbytes() > 0:
                sizes[storage.data_ptr()] = storage.nbytes()
                names.setdefault(storage.data_ptr(), set()).add(name)
        starts = sorted(sizes)
        lengths = np.array([sizes[start] for start in starts], dtype=np.int64)
        self._starts = np.array(starts, dtype=np.int64)
        self._ends = self._starts + lengths
        self._names = [names[start] for start in starts]
        # a piece: the shortest element that the launch was given
        self._width = min((x.element_size() for x in tensors.values()), default=1)
        self._first_piece = np.concatenate([[0], np.cumsum(lengths // self._width)])
        self._writer = np.full(self._first_piece[-1], NOBODY, dtype=np.int64)
        self._reader = self._writer.copy()

    def load(self, addresses: np.ndarray, width: int) -> None:
        """The program reads elements of `width` bytes at these addresses."""
        pieces = self._pieces(addresses, width)
        self._refuse(pieces, self._writer, "reads what the launch wrote")
        reader = self._reader[pieces]
        is_first = (reader == NOBODY) | (reader == self.program)
        self._reader[pieces] = np.where(is_first, self.program, SEVERAL)

    def store(self, addresses: np.ndarray, width: int) -> None:
        """The program writes them."""
        if len(np.unique(addresses)) < len(addresses):
            raise AssertionError(f"{self._kernel}: one store has two values for an address")
        pieces = self._pieces(addresses, width)
        self._refuse(pieces, self._writer, "writes what the launch wrote")
        self._refuse(pieces, self._reader, "writes what the launch read")
        self._writer[pieces] = self.program

    def _pieces(self, addresses: np.ndarray, width: int) -> np.ndarray:
        which = np.searchsorted(self._starts, addresses, side="right") - 1
        if not ((which >= 0) & (addresses + width <= self._ends[which])).all():
            raise AssertionError(f"{self._kernel} leaves the memory of its tensors")
        first = self._first_piece[which] + (addresses - self._starts[which]) // self._width
        return (first[:, None] + np.arange(width // self._width)).ravel()

    def _refuse(self, pieces: np.ndarray, touched: np.ndarray, what: str) -> None:
        program = touched[pieces]
        for where, who in (
            ((program != NOBODY) & (program != self.program), "another program"),
            (program == self.program, "the same program"),
        ):
            which = np.searchsorted(self._first_piece, pieces[where], side="right") - 1
            names = set().union(*(self._names[n] for n in np.unique(which)))
            if names and (who == "another program" or not names & self._own_again):
                raise AssertionError(f"{self._kernel} {what}, by {who}: {sorted(names)}")


@contextmanager
def watched() -> Iterator[None]:
    """A kernel that leaves its tensors, or whose programs meet in one place of them, raises
    Triton's InterpreterError."""
    import triton.runtime.interpreter as interpreter

    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    plain_call, plain_place = executor.__call__, builder.set_grid_idx
    plain_load, plain_store = builder.create_masked_load, builder.create_masked_store
    launches: list[Launch] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        named = dict(zip(self.arg_names, args, strict=False)) | kwargs
        launches.append(Launch(self.fn.__name__, named))
        try:
            plain_call(self, *args, **kwargs)
        finally:
            launches.pop()

    def place(self: Any, x: int, y: int, z: int) -> None:
        plain_place(self, x, y, z)
        launches[-1].program = x + self.grid_dim[0] * (y + self.grid_dim[1] * z)

    def elements(pointers: Any, mask: Any) -> tuple[np.ndarray, int]:
        chosen = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        return chosen.astype(np.int64), max(8, pointers.get_element_ty().primitive_bitwidth) // 8

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].load(*elements(pointers, mask))
        return plain_load(self, pointers, mask, *rest)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launches[-1].store(*elements(pointers, mask))
        return plain_store(self, pointers, value, mask, *rest)

    executor.__call__, builder.set_grid_idx = call, place
    builder.create_masked_load, builder.create_masked_store = load, store
    try:
        yield
    finally:
        executor.__call__, builder.set_grid_idx = plain_call, plain_place
        builder.create_masked_load, builder.create_masked_store = plain_load, plain_store
