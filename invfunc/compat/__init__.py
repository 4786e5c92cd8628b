"""The names of the libraries that this one succeeds, over the same values; MIGRATING.md tells what differs, and why.

- `invfunc.compat.memcnn`: what ``import memcnn`` gave.
- `invfunc.compat.invtorch`: what ``import invtorch`` gave, and in its ``nn`` what ``import invtorch.nn as inn`` gave.
"""

from . import invtorch, memcnn

__all__ = ["invtorch", "memcnn"]
