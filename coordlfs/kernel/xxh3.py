"""XXH3 for compiled modules: they call the function of the C library that the package xxhash brings."""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys

import xxhash

_NAMES = "XXH3_64bits_withSeed_dispatch", "XXH3_64bits_withSeed"  # the first makes use of all that the processor has
_LENGTHS, _SEEDS = (1, 56, 1280), (0, 7)  # that it is tried with


@functools.cache
def address() -> int:
    """Where XXH3_64bits_withSeed is, to which the package offers no other way; 0 if nobody says."""
    places = (getattr(sys.modules.get("xxhash._xxhash"), "__file__", None), "libxxhash.so.0")
    for place, name in itertools.product(places, _NAMES):
        try:
            function = getattr(ctypes.CDLL(place), name)
        except (OSError, AttributeError, TypeError):
            continue
        function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint64], ctypes.c_uint64
        sample = bytes(range(256)) * 5
        tried = itertools.product(_LENGTHS, _SEEDS)
        if all(function(sample, n, seed) == xxhash.xxh3_64_intdigest(sample[:n], seed) for n, seed in tried):
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    return 0
