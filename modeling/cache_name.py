"""The cache by both of its names: `cache` since Transformers 5.24, `past_key_values` before."""

import inspect
import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from transformers.modeling_outputs import BaseModelOutputWithPast

OLD_NAME = "past_key_values"
# What Transformers here calls it, in what models are given and in what they return.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else OLD_NAME

Function = TypeVar("Function", bound=Callable[..., Any])


def takes_cache(function: Function) -> Function:
    """Lets `past_key_values` stand for the argument `cache`, whatever Transformers calls it.

    Raises:
        ValueError: both are given.
    """

    @wraps(function)
    def wrapper(*args, **kwargs):
        if OLD_NAME in kwargs:
            if kwargs.get("cache") is not None:
                raise ValueError(f"cache and {OLD_NAME} are the same, one of them is allowed")
            if CACHE != OLD_NAME:
                warnings.warn(f"`{OLD_NAME}` is deprecated, use `cache`", FutureWarning, 2)
            kwargs["cache"] = kwargs.pop(OLD_NAME)
        return function(*args, **kwargs)

    # `generate()` refuses what no signature names.
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    named = [each.replace(name=CACHE) if each.name == "cache" else each for each in parameters]
    vars(wrapper)["__signature__"] = signature.replace(parameters=named)
    return cast(Function, wrapper)
