"""Triton's interpreter without work that has no effect: the same results in less time.

Written for the internals of Triton 3.6 and 3.9; the interpreter of any other version runs as it is.
"""

import dataclasses
import inspect
import math
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import cache
from unittest.mock import patch

VERSIONS = ("3.6.", "3.9.")
OPERANDS = "binary_op_type_checking_impl"


@contextmanager
def faster():
    """Within this context kernels are interpreted faster."""
    import triton
    from triton.language import core
    from triton.language.semantic import TritonSemantic as Semantic
    from triton.runtime import interpreter

    with ExitStack() as changes:
        if triton.__version__.startswith(VERSIONS):
            for change in (
                patch.object(interpreter, "_patch_lang", patched_once(interpreter._patch_lang)),
                patch.object(interpreter, "_get_np_dtype", of_scalars(interpreter._get_np_dtype)),
                patch.object(interpreter.interpreter_builder, "options", unasserted(interpreter)),
                patch.object(interpreter, "_patch_builtin", searched_once(interpreter.interpreter_builder)),
                patch.object(interpreter.TensorHandle, "__post_init__", lambda self: None),  # a check
                patch.object(core, "_unwrap_if_constexpr", unwrapped(core)),
                patch.object(core.tensor, "__init__", tensors(core)),
                patch.object(core.block_type, "__init__", checked_once(core.block_type.__init__)),
                patch.object(Semantic, "broadcast_impl_value", of_one_shape(Semantic.broadcast_impl_value)),
                patch.object(Semantic, OPERANDS, of_one_type(core.tensor, getattr(Semantic, OPERANDS))),
            ):
                changes.enter_context(change)
        yield


def patched_once(plain: Callable) -> Callable:
    """Patch ``triton.language`` once per launch and module, not again for each call of a device function.

    The first call of a launch gets the scope that takes the patches back; device functions never take theirs back.
    """
    modules: set[int] = set()

    def patch_lang(fn):
        module, first = id(fn.__globals__), not modules
        if module in modules:
            return None
        scope = plain(fn)
        modules.add(module)
        if first:
            restore = scope.restore
            scope.restore = lambda: (modules.clear(), restore())
        return scope

    return patch_lang


def of_scalars(plain: Callable) -> Callable:
    """Look up the NumPy type of each scalar once, and of a block by its elements; types of pointers have no hash."""
    remembered = cache(plain)
    return lambda dtype: plain(dtype) if dtype.scalar.is_ptr() else remembered(dtype.scalar)


def unasserted(interpreter):
    """Leave out checks for overflow: their results go to ``device_assert``, which only a debugger's option turns on."""
    options = interpreter.interpreter_builder.options
    return options if options.debug else dataclasses.replace(options, sanitize_overflow=False)


def searched_once(builder) -> Callable:
    """Look up and wrap once what there is to patch in a module or class."""
    from triton.language import core
    from triton.language.semantic import TritonSemantic

    semantic = TritonSemantic(builder)

    def interpreted(member):
        plain = inspect.unwrap(member)  # of the check that a compiler calls it
        return lambda *args, _semantic=None, **kwargs: plain(*args, _semantic=semantic, **kwargs)

    @cache
    def builtins(package):
        found = inspect.getmembers(package)
        return [(name, interpreted(member)) for name, member in found if core.is_builtin(member)]

    def patch_builtin(package, builder, scope):
        for name, member in builtins(package):
            scope.set_attr(package, name, member)

    return patch_builtin


def unwrapped(core) -> Callable:
    """Take constants and what is none on the short way; containers go on the long one."""
    plain, containers = core._unwrap_if_constexpr, (list, tuple, core.tuple)

    def unwrap(value):
        if isinstance(value, core.constexpr):
            return value.value
        return plain(value) if isinstance(value, containers) else value

    return unwrap


def of_one_shape(plain: Callable) -> Callable:
    """Leave two tensors of one shape as they are; :func:`tensors` has one object for each shape."""

    def broadcast(self, left, right):
        return (left, right) if left.shape is right.shape else plain(self, left, right)

    return broadcast


def of_one_type(tensor: type, plain: Callable) -> Callable:
    """Leave two operands of one type and shape as they are, except in a division, and pointers."""

    def operands(self, left, right, *options, **division):
        alike = type(left) is type(right) is tensor and left.dtype is right.dtype and left.shape is right.shape
        if alike and not division and len(options) < 4 and not left.dtype.is_ptr():  # the fourth says that it is one
            return left, right
        return plain(self, left, right, *options, **division)

    return operands


def tensors(core) -> Callable:
    """Make the constants of a shape once, not for each tensor."""

    @cache
    def constants(shape):
        return core.constexpr(math.prod(shape)), core.tuple([core.constexpr(n) for n in shape])

    def init(self, handle, kind):
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.numel, self.shape = constants(tuple(kind.shape) if kind.is_block() else ())

    return init


def checked_once(plain: Callable) -> Callable:
    """Check each type of a block once; types of pointers have no hash."""
    remembered: dict = {}

    def init(self, element_ty, shape):
        if element_ty.is_ptr():
            plain(self, element_ty, shape)
            return
        key = element_ty, tuple(shape)
        if key not in remembered:
            plain(self, element_ty, shape)
            remembered[key] = dict(vars(self))
        vars(self).update(remembered[key])

    return init
