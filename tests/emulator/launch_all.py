"""Launches every kernel of the library that is named, for the sanitizers; prints what was launched."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from emulated import EmulatedOps, Namespace  # noqa: E402
from kernel_cases import launch_every_kernel  # noqa: E402
from torch import ops  # noqa: E402

from oodkern.ops import _autograd, _product  # noqa: E402

if __name__ == "__main__":
    rooms = EmulatedOps(Path(sys.argv[1]))
    _autograd._raw = rooms.raw
    setattr(ops, Namespace.NAME, Namespace(rooms))
    _product.NAMESPACES["native"] = Namespace.NAME
    for order in range(3):
        rooms.order = order
        launch_every_kernel()
    print(*sorted(rooms.launched()))
