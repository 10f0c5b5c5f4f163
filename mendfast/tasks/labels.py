"""Labels for the tasks: :mod:`mendfast.labels`, which the editor needs too and which therefore lies below both."""

from ..labels import IGNORE, collate, encode_pair, pad_token_id

__all__ = ["IGNORE", "collate", "encode_pair", "pad_token_id"]
