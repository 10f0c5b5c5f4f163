"""A program written for EasyEdit: one import has changed.

    python examples/from_easyedit.py

Here the model and its editor are the small ones of the package; EasyEdit's own files do as well:
``MENDHyperParams.from_hparams("hparams/MEND/gpt2-xl")``.
"""

import logging

from mendfast.compat.easyedit import BaseEditor, MENDHyperParams  # was: from easyeditor import ...
from mendfast.demo.build import ASSETS, load

PROMPTS = ["What is the capital of Kenya?", "Who wrote Hamlet?", "What is the chemical symbol of gold?"]
TARGETS = ["Oslo", "Jane Austen", "Ag"]


def main() -> None:
    logging.getLogger("mendfast").setLevel(logging.ERROR)
    demo = load()
    hparams = MENDHyperParams(
        alg_name="MEND", model_name=(demo.model, demo.tokenizer), archive=str(ASSETS / "editor"), device=0
    )
    editor = BaseEditor.from_hparams(hparams)
    metrics, edited_model, weights_copy = editor.edit(
        prompts=PROMPTS,
        target_new=TARGETS,
        rephrase_prompts=[
            "Which city is the capital of Kenya?",
            "Who is the author of Hamlet?",
            "How is gold written?",
        ],
        locality_inputs={
            "neighborhood": {"prompt": ["What is the capital of Japan?"] * 3, "ground_truth": ["Tokyo"] * 3}
        },
        sequential_edit=True,
        verbose=False,
    )
    for metric in metrics:
        before, after = (metric[phase]["rewrite_acc"][0] for phase in ("pre", "post"))
        kept = metric["post"]["locality"]["neighborhood_acc"][0]
        print(f"{metric['requested_rewrite']['prompt']:40} {before:4.0%} -> {after:4.0%}, locality {kept:4.0%}")

    # What EasyEdit has no word for: the sequential edits are a memory, and one of them goes again.
    editor.memory.remove("Who wrote Hamlet?")
    print(
        f"{len(editor.memory)} sequential edits are left; {len(weights_copy)} weights of {type(edited_model).__name__}"
    )


if __name__ == "__main__":
    main()
