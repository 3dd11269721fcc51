"""TEMP."""
from __future__ import annotations
import os
from quicksilver.ops import _native
ROW_LIMIT = 16
def module(): return _native
def is_enabled(): return os.environ.get("QUICKSILVER_KERNELS") != "torch"
def can_prepare(module):
    return all(bool((t == t.round()).all()) for t in module.codes.tables.values())
def prepared(module):
    if getattr(module, "_prep", None) is None:
        c = module.codes
        module._prep = _native.prepare([p.contiguous() for p in c.planes], c.grid.exponents, c.grid.zeros, float(c.grid.largest), c.tables[4], c.tables[2], c.grid.group_size, c.num_outputs)
    return module._prep
