"""Compare MEND with other ways to edit, on the same edits of the same model.

    python examples/compare_systems.py

The command line does it on whole data sets, with intervals, tables and a page: ``mendfast eval``.
"""

from mendfast.baselines import SYSTEMS, FineTuning, Identity, Mend
from mendfast.baselines.measure import measure, summarise
from mendfast.demo import build
from mendfast.tasks import world

EDITS, UNRELATED = 5, 24
FIGURES = ("edit_success", "generality", "drawdown", "seconds")


def main() -> None:
    editor = build.load()
    systems = [Mend(editor), Identity(editor.untrained()), FineTuning(editor, learning_rate=3e-3)]
    _, held_out = world.splits()
    facts = held_out[:: len(held_out) // (EDITS + UNRELATED)]
    unrelated = [(world.question(fact, 0), fact.answer) for fact in facts[EDITS : EDITS + UNRELATED]]

    print(f"{'':28}" + "".join(f"{name:>14}" for name in FIGURES))
    for system in systems:
        rows = []
        for fact in facts[:EDITS]:
            target = next(answer for answer in world.answers(fact.relation) if answer != fact.answer)
            outcome = measure(
                system,
                [(world.question(fact, 0), target)],
                rephrasings=[(world.question(fact, -1), target)],  # a wording that no editor was trained on
                locality=unrelated,
                generate=False,  # teacher-forced alone
            )
            rows.append(outcome.figures)  # the model has its old bits again
        means = summarise(rows)
        print(f"{system.name:28}" + "".join(f"{means[name].mean:14.3f}" for name in FIGURES))
    print(f"\nSystems by key: {', '.join(SYSTEMS)}")


if __name__ == "__main__":
    main()
