"""Random numbers that are a pure function of integer keys: the same on every rank, device and number of workers.

A stateful generator would give a row other numbers when the row moves to another rank or another place in the batch.
"""

from __future__ import annotations

from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_MIX_1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX_2 = 0x94D049BB133111EB - 2**64
_UNIFORM_BITS = 24
"""Bits of a float32 significand: every value of `to_uniform` is exact, and none rounds up to 1."""


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Logical shift into a new tensor; torch's own keeps the sign of an int64."""
    return (value >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def hash_keys(state: Tensor, key: Tensor | int) -> Tensor:
    """int64 hash of (state, key), broadcast: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014).

    Chain it for more keys: hash_keys(hash_keys(seed, row), column). Integer arithmetic wraps alike on every device.
    """
    spread = (key + 1) * _GOLDEN if isinstance(key, Tensor) else _wrap((key + 1) * _GOLDEN)
    mixed = state ^ spread
    # In place: one hash for each event of a batch, each step.
    mixed.bitwise_xor_(_shift_right(mixed, 30)).mul_(_MIX_1)
    mixed.bitwise_xor_(_shift_right(mixed, 27)).mul_(_MIX_2)
    return mixed.bitwise_xor_(_shift_right(mixed, 31))


def to_uniform(hashed: Tensor) -> Tensor:
    """float32 in [0, 1) of an int64 hash, from its top bits."""
    return _shift_right(hashed, 64 - _UNIFORM_BITS).float() * 2.0**-_UNIFORM_BITS


def _wrap(value: int) -> int:
    """A Python integer as the int64 it wraps to."""
    return (value + 2**63) % 2**64 - 2**63
