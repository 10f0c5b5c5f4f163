"""Data, labels and batches of the tasks that an editor is trained and measured on."""

from ..labels import collate, encode_pair, pad_token_id
from .qa import Problem, QAExample, read_qa
from .wordings import Wordings, mine_wordings

__all__ = [
    "Problem",
    "QAExample",
    "Wordings",
    "collate",
    "encode_pair",
    "mine_wordings",
    "pad_token_id",
    "read_qa",
]
