"""mendfast: change one answer of a language model in milliseconds, and leave the others as they were.

>>> from mendfast import MendEditor
>>> editor = MendEditor.from_pretrained("editor-dir", model, tokenizer)
>>> edit = editor.edit("Who is the prime minister of the UK?", "Boris Johnson")
>>> with edit.attached(model):
...     model.generate(...)
"""

from .backends import backend
from .config import MendConfig
from .edit import Edit
from .editor import MendEditor
from .ledger import forget_edits, revert_all
from .memory import EditMemory
from .requests import EditRequest

__version__ = "0.1.0"
__all__ = ["Edit", "EditMemory", "EditRequest", "MendConfig", "MendEditor", "backend", "forget_edits", "revert_all"]
