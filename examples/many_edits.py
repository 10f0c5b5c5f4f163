"""Make many edits at once, and take some of them out again.

    python examples/many_edits.py

Two ways to put edits together: the sum of the separate ones, which is the paper's, and least squares under what
must stay, which is for many and what the demo's editor was trained for.
"""

from mendfast import Edit, revert_all
from mendfast.demo import build
from mendfast.metrics import correct
from mendfast.tasks import world

MANY, ASKED = 24, 64


def requests(count: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Edits of facts that the editor was not trained on, each to another answer; and facts to leave alone."""
    _, held_out = world.splits()
    chosen = held_out[:: len(held_out) // count][:count]
    edits = []
    for i, fact in enumerate(chosen):
        others = [answer for answer in world.answers(fact.relation) if answer != fact.answer]
        edits.append((world.question(fact, 0), others[i % len(others)]))
    rest = [fact for fact in held_out if fact not in chosen]
    return edits, [(world.question(fact, 0), fact.answer) for fact in rest[:: len(rest) // ASKED][:ASKED]]


def main() -> None:
    editor = build.load()
    edits, unrelated = requests(MANY)
    for name, edit in (("sum", editor.aggregating("sum").edit(edits)), ("least squares", editor.edit(edits))):
        with edit.attached(editor.model):
            learned, kept = (correct(editor, pairs).float().mean().item() for pairs in (edits, unrelated))
        print(f"{name:14} {learned:4.0%} of {MANY} edits learned, {kept:4.0%} of {len(unrelated)} other facts right")

    # Edits that lie in the weights come out one by one, in any order.
    applied = [editor.edit(*edit).apply_(editor.model) for edit in edits[:4]]
    applied[1].revert_(editor.model)
    print(f"three of four edits are left: {Edit.sum([applied[0], *applied[2:]])}")
    revert_all(editor.model)


if __name__ == "__main__":
    main()
