"""Export an edit as a LoRA adapter, check it with PEFT, and say how vLLM serves it.

    python examples/serve_an_edit.py                         # needs: pip install peft

vLLM serves the model families that it knows; the small GPT-2 here shows the way, PEFT that the adapter is the edit.
"""

import copy
import tempfile
from pathlib import Path

import torch
from peft import PeftModel

from mendfast import EditMemory
from mendfast.demo import build
from mendfast.generation import answer

FACTS = [("What is the capital of Kenya?", "Oslo"), ("Who wrote Hamlet?", "Jane Austen")]


def main(folder: Path) -> None:
    editor = build.load()
    model = editor.model
    memory = EditMemory(editor)
    memory.add(FACTS)
    edit = memory.edit()

    exported = edit.export_peft(folder / "adapter", model)  # exact; rank=16 truncates, and says how much
    served = PeftModel.from_pretrained(copy.deepcopy(model), folder / "adapter").eval()

    tokens = editor.tokenizer("Q: What is the capital of Kenya? A:", return_tensors="pt")
    with torch.no_grad(), edit.attached(model):
        gap = (served(**tokens).logits - model(**tokens).logits).abs().max().item()
    assert gap < 1e-3, gap
    print(f"PEFT and the edit differ by {gap:.1g} at most; rank {exported.r}")

    with edit.attached(model):
        print(dict(zip([question for question, _ in FACTS], answer(editor, [q for q, _ in FACTS]), strict=True)))

    # Another content is another name: a server keeps what it has computed of a prompt under the adapter's.
    print("\nvllm serve YOUR-MODEL --enable-lora \\")
    print(f"    --max-lora-rank {exported.r} --lora-modules {exported.lora_name}=adapter")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
