"""A pretend GPU: the device "cudapretend" computes on the CPU, but by a GPU's rules.

Import it before the code under test, in a process of its own: torch keeps the device to the end.
A tensor of the device is a Pretend, which wraps a tensor of the CPU (.raw).

Refused, as on CUDA: an operation on tensors of both devices (but for scalars of the CPU, indices
and copies), .numpy(), a generator of the CPU. A copy to the CPU that does not block holds NaN until
the host waits for the device.
Counted, by operation: LAUNCHES (views are none), BYTES read and written, FLOPS. By line of the
project: WAITS of the host for the device. MEMORY: bytes that tensors hold, now and at most.

USE.raw = "meta": tensors made from now on have a shape but no numbers (each that is read is 1). So
a network of any size is counted, without its memory.
"""

import contextlib
import functools
import sys
import threading
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as set_up
from torch.utils.flop_counter import flop_registry

NAME = "cudapretend"
PROJECT = str(Path(__file__).resolve().parent.parent)
COPIES = "copy_", "_to_copy"
READS = "_local_scalar_dense", "equal", "nonzero", "masked_select", "_unique2", "unique_dim"
LAUNCHES, BYTES, FLOPS, WAITS = Counter(), Counter(), Counter(), Counter()
MEMORY = SimpleNamespace(now=0, most=0, users=Counter())
USE = SimpleNamespace(raw="cpu")
ON_THE_WAY = []  # (tensor of the CPU, what it holds after the next wait)
KERNEL = threading.local()  # .written: storages that a function written as one kernel has changed


def reset():
    """Count from here on."""
    for counter in (LAUNCHES, BYTES, FLOPS, WAITS):
        counter.clear()
    MEMORY.most = MEMORY.now


class Held:
    """Count a storage as memory in use while one of its tensors is alive."""

    def __init__(self, storage):
        self.key = storage._cdata
        self.size = storage.nbytes()
        MEMORY.users[self.key] += 1
        if MEMORY.users[self.key] == 1:
            MEMORY.now += self.size
            if not in_kernel():
                MEMORY.most = max(MEMORY.most, MEMORY.now)

    def __del__(self):
        MEMORY.users[self.key] -= 1
        if MEMORY.users[self.key] == 0:
            MEMORY.now -= self.size


class Pretend(torch.Tensor):
    """A tensor of the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw):
        about = {"dtype": raw.dtype, "device": torch.device(NAME, 0)}
        about |= {"strides": raw.stride(), "storage_offset": raw.storage_offset()}
        return torch.Tensor._make_wrapper_subclass(cls, raw.shape, **about)

    def __init__(self, raw):
        self.raw = raw
        self.held = Held(raw.untyped_storage())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return execute(func, args, kwargs or {})

    def __repr__(self):
        return f"Pretend({self.raw})"

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a tensor of the GPU to numpy; use Tensor.cpu() first")

    def tolist(self):
        return self.cpu().tolist()

    def untyped_storage(self):  # safetensors compares the addresses
        return self.raw.untyped_storage()


# --------------------------------------------------------------------------------------------------
# An operation: its rules, its result, its cost.


def execute(func, args, kwargs):
    """Do an operation, of which the result or an argument lies on the device."""
    names, written = describe(func)
    given = dict(zip(names, args)) | kwargs
    name = func._schema.name.removeprefix("aten::")
    indices = given.get("indices") if name.startswith("index") else None
    to_cpu = target_of(name, given) == "cpu"
    crossing = None
    if name in COPIES:
        source = given["src"] if name == "copy_" else given["self"]
        if to_cpu or not isinstance(source, Pretend):
            crossing = "GPU -> CPU" if to_cpu else "CPU -> GPU"
    else:
        check(func, given, written, indices)

    if name in READS:
        wait(name)
    elif crossing and not (given.get("non_blocking") and raw_of(source).is_contiguous()):
        wait(crossing)  # other numbers go through memory that is not pinned
    elif reads_indices(indices):
        wait("index by bool or from the CPU")

    options = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    if given.get("device") is not None:
        options["device"] = "cpu" if to_cpu else USE.raw
    convert = numbers_of if to_cpu or name in READS else raw_of
    result = func(*change(convert, args), **change(convert, options))
    count(func, name, given, written, result)
    if to_cpu:
        return arrive(result, given.get("non_blocking"))
    return wrap(func, given, written, result)


def target_of(name, given):
    """Return the type of device that the result of an operation lies on."""
    if given.get("device") is not None:
        return torch.device(given["device"]).type
    return given["self"].device.type if name == "copy_" else NAME


def wrap(func, given, written, result):
    """Return the result as tensors of the device; what was written to, as it was given."""
    known = {id(raw_of(t)): t for t in tensors_of(given)}
    for key in written:
        for t in tensors_of(given.get(key)):
            if isinstance(t, Pretend) and t.stride() != t.raw.stride():
                raise NotImplementedError(f"{func} changes a shape in place")
    return change(lambda t: known[id(t)] if id(t) in known else Pretend(t), result)


@functools.cache
def describe(func):
    """Return the names of an operation's arguments, and of those that it writes to."""
    names = [argument.name for argument in func._schema.arguments]
    written = set()
    for argument in func._schema.arguments:
        if argument.alias_info and argument.alias_info.is_write:
            written.add(argument.name)
    return names, written


def change(function, value):
    """Return a value with function(tensor) in place of each tensor in it."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, (list, tuple)):
        return type(value)([change(function, v) for v in value])
    if isinstance(value, dict):
        return {key: change(function, v) for key, v in value.items()}
    return value


def tensors_of(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return []
    found = []
    for v in value:
        found += tensors_of(v)
    return found


def raw_of(tensor):
    return tensor.raw if isinstance(tensor, Pretend) else tensor


def numbers_of(tensor):
    raw = raw_of(tensor)
    return torch.ones_like(raw, device="cpu") if raw.is_meta else raw


def check(func, given, written, indices):
    """Raise RuntimeError as CUDA does, if an operation mixes devices.

    A scalar of the CPU is fine, and so are indices of a tensor on the device.
    """
    generator = given.get("generator")
    if generator is not None and generator.device.type != NAME:
        raise RuntimeError(f"Expected a '{NAME}' device type for generator: {func} {where()}")
    for key, value in given.items():
        for t in tensors_of(value):
            scalar = t is value and t.dim() == 0 and key not in written
            if not (isinstance(t, Pretend) or scalar or value is indices):
                what = f"{key} {list(t.shape)} of {func} is on {t.device}"
                raise RuntimeError(f"Expected all tensors to be on one device: {what}, {where()}")


def reads_indices(indices):
    """Say whether the host must know numbers of the device first, or the device the host's."""
    index = tensors_of(indices)
    return any(t.dtype == torch.bool or not isinstance(t, Pretend) for t in index)


def wait(reason):
    """Count a wait of the host. All that was on the way has arrived then."""
    WAITS[f"{reason}, {where()}"] += 1
    deliver()


def deliver():
    for target, values in ON_THE_WAY:
        target.copy_(values)
    ON_THE_WAY.clear()


def arrive(target, non_blocking):
    """Put NaN into a copy on the CPU until the next wait, if it does not block."""
    if non_blocking and target.is_floating_point():
        ON_THE_WAY.append((target, target.clone()))
        target.fill_(float("nan"))
    return target


def where():
    """Name the innermost line of the project that runs: "train.py:467"."""
    frame = sys._getframe(1)
    while frame:
        path = Path(frame.f_code.co_filename)
        if str(path.parent) == PROJECT:
            return f"{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


def count(func, name, given, written, result):
    """Count the launch of an operation, and what it moves and computes."""
    inputs = [raw_of(t) for t in tensors_of(given)]
    changed = [raw_of(t) for key in written for t in tensors_of(given.get(key))]
    outputs = tensors_of(result)
    memory = {key_of(t) for t in inputs}
    view = not written and any(key_of(t) in memory for t in outputs)
    if view or name.startswith(("empty", "new_empty")):
        return
    if in_kernel():
        KERNEL.written.update(key_of(t) for t in changed)
        return
    new = [t for t in outputs if key_of(t) not in memory]
    LAUNCHES[name] += 1
    BYTES[name] += sum(t.nbytes for t in inputs + changed + new)
    if name == "convolution_backward":  # torch's own formula leaves out the groups
        forward = 2 * given["grad_output"].numel() * given["weight"][0].numel()
        FLOPS[name] += forward * sum(given["output_mask"][:2])
    elif func._overloadpacket in flop_registry:
        FLOPS[name] += flop_registry[func._overloadpacket](*given.values(), out_val=result)


def key_of(raw):
    return raw.untyped_storage()._cdata


def in_kernel():
    return getattr(KERNEL, "written", None) is not None


def one_kernel(function):
    """Return a function that counts as what a compiler makes of it: one launch, no memory.

    It reads its arguments, and writes those that it changes.
    """

    @functools.wraps(function)
    def kernel(*args, **kwargs):
        KERNEL.written = set()
        result = function(*args, **kwargs)
        inputs = [t.raw for t in tensors_of([args, kwargs]) if isinstance(t, Pretend)]
        changed = [t for t in inputs if key_of(t) in KERNEL.written]
        KERNEL.written = None
        LAUNCHES[function.__name__] += 1
        BYTES[function.__name__] += sum(t.nbytes for t in inputs + changed)
        return result

    return kernel


# --------------------------------------------------------------------------------------------------
# The device, as torch sees it.


class Backend:
    """The module torch.cudapretend."""

    _initialized = True
    device = contextlib.nullcontext
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    is_available = is_initialized = staticmethod(lambda: True)
    _is_in_bad_fork = staticmethod(lambda: False)
    manual_seed_all = set_rng_state = staticmethod(lambda *args: None)
    get_rng_state = staticmethod(lambda *args: torch.zeros(16, dtype=torch.uint8))
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])
    synchronize = staticmethod(lambda device=None: wait("synchronize"))


def install():
    """Make the device known, with the operations that have no tensor to dispatch on."""
    set_up(NAME, backend_module=Backend())
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # .data = leaves .raw behind
    library = torch.library.Library("aten", "IMPL")

    def implement(name, func):
        def kernel(*args, **kwargs):
            return execute(func, args, kwargs)

        library.impl(name, kernel, "PrivateUse1")

    for full_name in torch._C._dispatch_get_all_op_names():
        name = full_name.removeprefix("aten::")
        packet, _, overload = name.partition(".")
        func = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
        if name != full_name and func:
            arguments = {a.name: str(a.type) for a in func._schema.arguments}
            if {"device", "dtype"} <= arguments.keys() and "Tensor" not in str(arguments):
                implement(name, func)
    implement("silu_backward", torch.ops.aten.silu_backward.default)  # else four operations

    def copy_from(source, target, non_blocking=False):  # of torch.tensor(..., device=)
        return execute(torch.ops.aten.copy_.default, (target, source), {})

    library.impl("_copy_from", copy_from, "PrivateUse1")
    return library


def pinned(tensor, device=None):
    """Copy a tensor as pin_memory does, gaps between its numbers included."""
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    return copy.copy_(tensor)


LIBRARY = install()
torch.Tensor.pin_memory = pinned
EMPTY_LIKE = torch.empty_like
torch.empty_like = lambda tensor, pin_memory=False, **options: EMPTY_LIKE(tensor, **options)
torch.compile = lambda function, **options: one_kernel(function)
