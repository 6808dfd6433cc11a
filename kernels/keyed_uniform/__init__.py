"""Uniform numbers as a pure function of a key, for any order, number of ranks and device."""

from mlip.kernels.keyed_uniform.op import splitmix_uniform

__all__ = ["splitmix_uniform"]
