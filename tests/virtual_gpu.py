"""A GPU that is none: tensors that lie in host memory and behave as if they lay on "cuda".

On a machine without a GPU nothing else shows that a tensor was left on the host, that a result is
read by NumPy where it lies, or that a step makes the host wait. Each storage has a place; every
operation computes on the CPU as it always does, refuses what a GPU would refuse and gives its
results the place that they would have. What only a GPU does (kernels, streams, NCCL) is not here.
"""

from __future__ import annotations

import contextlib
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, HOST, EITHER = "gpu", "host", "either"  # EITHER: made inside an operation, from nothing
CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parents[1]

# the first may lie elsewhere than the second
_COPIES = ("aten::copy_", "aten::_to_copy", "aten::_copy_from", "aten::set_")
# of these the second argument, a list of indices, may lie on the host
_INDEXING = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")
# a tensor without dimensions may join from the host, but not here
_STRICT = ("aten::cat", "aten::stack", "aten::_fused_adamw_", "aten::_foreach_add_.List")
# the host has to know the values
_WAITS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::masked_select",
          "aten::_unique2", "aten::is_nonzero")  # fmt: skip

# refused under torch.use_deterministic_algorithms, as its documentation lists them (torch 2.13)
_UNORDERED = re.compile(
    r"aten::(upsample_(linear1d|bilinear2d|bicubic2d|trilinear3d)_backward|_upsample_\w+_aa_backward"
    r"|avg_pool3d_backward|_?adaptive_avg_pool[23]d_backward|adaptive_max_pool2d_backward"
    r"|fractional_max_pool[23]d_backward|max_unpool[23]d|reflection_pad[123]d_backward"
    r"|nll_loss2d_\w+|_ctc_loss_backward|put_?|histc|median|grid_sampler_[23]d_backward)"
)

_FROM_NOTHING = ("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
                 "randperm", "scalar_tensor", "tensor", "zeros")  # fmt: skip
_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randn_like", "zeros_like")


class VirtualGpu(TorchDispatchMode):
    """The places of all storages, and the lines of this project at which the host waited."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[int, tuple[StorageWeakRef, str]] = {}
        self.pinned: dict[int, StorageWeakRef] = {}
        self.waits: list[str] = []
        self._made = threading.local()  # the place of what is being made

    # places

    def place(self, tensor: torch.Tensor) -> str:
        known = self.places.get(tensor.untyped_storage()._cdata)
        return known[1] if known is not None else HOST

    def put(self, tensor: torch.Tensor, place: str) -> torch.Tensor:
        storage = tensor.untyped_storage()
        # the weak reference keeps the address from being used again
        self.places[storage._cdata] = StorageWeakRef(storage), place
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self.pinned

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor, its memory page-locked from now on."""
        if self.place(tensor) == GPU:
            raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors")
        storage = tensor.untyped_storage()
        self.pinned[storage._cdata] = StorageWeakRef(storage)
        return tensor

    def wait(self, why: str) -> None:
        """Note the innermost line of mlip at which the host waits for the GPU."""
        lines = [
            f"{Path(frame.filename).resolve().relative_to(ROOT)}:{frame.name}"
            for frame in traceback.extract_stack()
            if Path(frame.filename).resolve().is_relative_to(ROOT)
            and "tests" not in Path(frame.filename).parts
            and ".venv" not in Path(frame.filename).parts
        ]
        self.waits.append(f"{lines[-1] if lines else 'outside'} ({why})")

    @contextlib.contextmanager
    def making(self, place: str | None) -> Iterator[None]:
        before = getattr(self._made, "place", None)
        self._made.place = place
        try:
            yield
        finally:
            self._made.place = before

    def move(self, tensor: torch.Tensor, place: str, non_blocking: bool) -> torch.Tensor:
        if self.place(tensor) == GPU:
            self.wait("to the host")
        elif not (non_blocking and self.is_pinned(tensor)):
            self.wait("from pageable memory")
        return _Move.apply(tensor, self, place)

    # operations

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        places = [self.place(tensor) for tensor in tensors]
        if GPU in places and HOST in places:
            self._check(func, name, tensors, places, args)
        if GPU in places and torch.are_deterministic_algorithms_enabled():
            _check_order(name, tensors)
        if GPU in places and (name in _WAITS or name in _INDEXING and _has_mask(args)):
            self.wait(name)
        if name == "aten::copy_" and set(places) == {GPU, HOST}:
            is_free = len(args) > 2 and args[2] and any(map(self.is_pinned, tensors))
            if not is_free:
                self.wait("copy_")
        made = func(*args, **(kwargs or {}))
        forced = getattr(self._made, "place", None)
        inferred = next((p for p in (GPU, HOST) if p in places), EITHER)
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                if leaf.untyped_storage()._cdata not in self.places:
                    self.put(leaf, forced or inferred)
        return made

    def _check(self, func: Any, name: str, tensors: Any, places: list[str], args: Any) -> None:
        if name in _COPIES:
            return
        if name in _INDEXING:
            indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
            others = [
                place
                for tensor, place in zip(tensors, places, strict=True)
                if not any(tensor is index for index in indices) and tensor.ndim
            ]
            if len(set(others) - {EITHER}) <= 1 and others[0] == GPU:
                return
        is_strict = name in _STRICT or f"{name}.{func._overloadname}" in _STRICT
        astray = [
            list(tensor.shape)
            for tensor, place in zip(tensors, places, strict=True)
            if place == HOST and (is_strict or tensor.ndim > 0)
        ]
        if astray:
            raise RuntimeError(
                f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu; on "
                f"the host lie tensors of the shapes {astray}"
            )


def _check_order(name: str, tensors: list[torch.Tensor]) -> None:
    is_sum = name in ("aten::cumsum", "aten::cumsum_") and tensors[0].is_floating_point()
    is_weighted = name == "aten::bincount" and len(tensors) > 1
    if is_sum or is_weighted or _UNORDERED.fullmatch(name):
        raise RuntimeError(
            f"{name} does not have a deterministic implementation, but you set "
            "'torch.use_deterministic_algorithms(True)'"
        )


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gpu: VirtualGpu, place: str) -> torch.Tensor:
        ctx.gpu, ctx.origin = gpu, gpu.place(x)
        with gpu.making(place):
            # preserving strides, as the real copy does
            return gpu.put(torch.Tensor.clone(x), place)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        with ctx.gpu.making(ctx.origin):
            return ctx.gpu.put(grads[0].clone(), ctx.origin), None, None


def _has_mask(args: Any) -> bool:
    return any(
        isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
    )


def _is_gpu(device: Any) -> bool | None:
    """Whether a device argument means the GPU; None where there is none."""
    if device is None:
        return None
    return isinstance(device, int) or torch.device(device).type == "cuda"


@contextlib.contextmanager
def virtual_gpu() -> Iterator[VirtualGpu]:
    """torch with one GPU inside; other threads see its devices, but only this one is checked.

    Skips the test where torch is a build for GPUs: that one asks the driver what is there.
    """
    if torch.version.cuda is not None:
        pytest.skip("the virtual GPU needs a CPU build of torch")
    gpu = VirtualGpu()
    tensor = torch.Tensor
    real_to, real_numpy, real_tolist = tensor.to, tensor.numpy, tensor.tolist
    real_new_tensor, real_array, real_device = (
        tensor.new_tensor,
        tensor.__array__,
        tensor.device,
    )

    def device(self: torch.Tensor) -> torch.device:
        return CUDA if gpu.place(self) == GPU else real_device.__get__(self)

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        is_copy = kwargs.pop("copy", False)
        if "other" in kwargs:
            args = (kwargs.pop("other"), *args)
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        where, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        settings: dict[str, Any] = {} if memory_format is None else {"memory_format": memory_format}
        if where is not None and where.type == "meta":
            return real_to(self, where)
        place = None if where is None else GPU if where.type == "cuda" else HOST
        if place is not None and place != gpu.place(self) and gpu.place(self) != EITHER:
            self, is_copy = gpu.move(self, place, non_blocking), False
        return real_to(self, dtype=dtype or self.dtype, copy=is_copy, **settings)

    def on_host(real: Callable[..., Any]) -> Callable[..., Any]:
        def read(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if gpu.place(self) == GPU:
                raise TypeError(
                    "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy "
                    "the tensor to host memory first."
                )
            return real(self, *args, **kwargs)

        return read

    def tolist(self: torch.Tensor) -> Any:
        if gpu.place(self) == GPU:
            gpu.wait("tolist")
        return real_tolist(self)

    def new_tensor(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        place = gpu.place(self)
        if place == GPU:
            gpu.wait("new_tensor")
        with gpu.making(HOST):
            made = real_new_tensor(self, *args, **kwargs)
        return gpu.put(made, place)

    def factory(name: str, real: Callable[..., Any], is_like: bool) -> Callable[..., Any]:
        def make(*args: Any, **kwargs: Any) -> torch.Tensor:
            is_gpu = _is_gpu(kwargs.pop("device", None))
            generator, is_pinned = kwargs.get("generator"), kwargs.pop("pin_memory", False)
            if is_gpu and generator is not None and generator.device.type == "cpu":
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            if is_gpu is None and is_like:
                return real(*args, **kwargs)
            place = GPU if is_gpu else HOST
            if place == GPU and name == "tensor":
                gpu.wait("torch.tensor")
            with gpu.making(place):
                made = gpu.put(real(*args, **kwargs), place)
            return gpu.pin(made) if is_pinned else made

        return make

    class Autocast(torch.autocast):
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def for_cpu(real: Callable[..., Any]) -> Callable[..., Any]:
        return lambda kind="cuda", *rest: real("cpu" if kind == "cuda" else kind, *rest)

    real_groups = torch._C._group_tensors_by_device_and_dtype

    def groups(lists: Any, with_indices: bool = False) -> Any:
        found = {}
        for (where, dtype), made in real_groups(lists, with_indices).items():
            # C++ sees the real device
            first = next((t for t in made[0][0] if t is not None), None)
            found[where if first is None else first.device, dtype] = made
        return found

    facts = SimpleNamespace(
        name="virtual", major=9, minor=0, total_memory=2**36, multi_processor_count=132
    )
    cuda: dict[str, Any] = {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "device_count": lambda: 1,
        "set_device": lambda device: None,
        "synchronize": lambda device=None: gpu.wait("synchronize"),
        "get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "max_memory_allocated": lambda device=None: 0,
        "get_device_properties": lambda device=None: facts,
        "Event": mock.MagicMock,
        "Stream": mock.MagicMock,
        "stream": mock.MagicMock(),
        "device": mock.MagicMock(),
        "current_stream": mock.MagicMock(),
        "default_stream": mock.MagicMock(),
    }
    methods: dict[str, Any] = {
        "device": property(device),
        "is_cuda": property(lambda self: gpu.place(self) == GPU),
        "is_cpu": property(lambda self: gpu.place(self) != GPU),
        "to": to,
        "cpu": lambda self, *args, **kwargs: to(self, "cpu"),
        "cuda": lambda self, *args, **kwargs: to(self, "cuda"),
        "numpy": on_host(real_numpy),
        "__array__": on_host(real_array),
        "tolist": tolist,
        "new_tensor": new_tensor,
        "pin_memory": lambda self, *args: gpu.pin(self.detach().clone()),
        "is_pinned": lambda self, *args: gpu.is_pinned(self),
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        for name, value in methods.items():
            stack.enter_context(mock.patch.object(tensor, name, value))
        for name in (*_FROM_NOTHING, *_LIKE):
            made = factory(name, getattr(torch, name), name in _LIKE)
            stack.enter_context(mock.patch.object(torch, name, made))
        for name in ("is_autocast_enabled", "get_autocast_dtype"):
            stack.enter_context(mock.patch.object(torch, name, for_cpu(getattr(torch, name))))
        stack.enter_context(
            mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", groups)
        )
        stack.enter_context(mock.patch.object(torch, "autocast", Autocast))
        stack.enter_context(mock.patch.object(torch.amp, "autocast", Autocast))
        stack.enter_context(gpu)
        yield gpu
