"""The Triton kernels, one module per op: ``from mendfast.kernels import rank1_update``.

They lie in ``kernels/`` of a checkout and in ``mendfast/kernels/`` of an installation. Neither folder has an
``__init__.py``: a program run from the checkout's root must still get Hugging Face's package by
``import kernels``, and a folder without one gives way to it. So this module is the package.
"""

from pathlib import Path

_here = Path(__file__).parent
__path__ = [str(folder) for folder in (_here / "kernels", _here.parent / "kernels") if folder.is_dir()][:1]
