"""Process-wide defaults, read while a call is traced: what jit has compiled does not change."""

from __future__ import annotations

import os

import numpy as np

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("", "0", "false", "no", "off")


def _flag_from_environment(name: str) -> bool:
    text = os.environ.get(name, "").strip().lower()
    if text not in _TRUE + _FALSE:
        raise ValueError(f"{name}: got {text!r}, expected one of {', '.join(_TRUE + _FALSE[1:])}")
    return text in _TRUE


class Config:
    """The object `jax_fa3.config`; setting an attribute that it has not raises AttributeError."""

    __slots__ = ("_deterministic_backward",)

    def __init__(self) -> None:
        self._deterministic_backward = _flag_from_environment("JAX_FA3_DETERMINISTIC")

    @property
    def deterministic_backward(self) -> bool:
        """What `deterministic_backward=None` means: gradients repeat bit for bit, or need not.

        Starts as the environment variable JAX_FA3_DETERMINISTIC (1 or 0; unset is 0).
        """
        return self._deterministic_backward

    @deterministic_backward.setter
    def deterministic_backward(self, value: bool) -> None:
        if not isinstance(value, (bool, np.bool_)):
            raise TypeError(f"config.deterministic_backward: got {value!r}, expected a bool")
        self._deterministic_backward = bool(value)

    def __repr__(self) -> str:
        return f"jax_fa3.config(deterministic_backward={self.deterministic_backward})"


config = Config()
