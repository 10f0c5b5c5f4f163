"""The Triton kernels, one module per op: ``from mendfast.kernels import rank1_update``.

This folder lies at the checkout's root, where a running program finds it as ``kernels``. That is the name of Hugging
Face's package, which transformers imports: under that name this module steps aside for it.
"""

if __name__ == "kernels":
    import importlib.util
    import sys
    from pathlib import Path

    def _installed():
        """The spec of another package of this name, further along the search path."""
        path = sys.path
        # this checkout, and any other of mendfast, which would step aside for this one in its turn
        sys.path = [entry for entry in path if not Path(entry, __name__, "rank1_update.py").is_file()]
        try:
            found = (finder.find_spec(__name__, None) for finder in sys.meta_path if hasattr(finder, "find_spec"))
            return next((spec for spec in found if spec is not None and spec.loader is not None), None)
        finally:
            sys.path = path

    if _spec := _installed():
        # the import that is under way returns what is registered when it ends
        sys.modules[__name__] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules[__name__])
    else:
        __version__ = "0"  # older than any version that transformers takes, so that it does without
