"""The Hub: what mendfast saves, with a card that says what it is, up and down. docs/hub.md."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from .schema import brief, shown

CARD_FILE = "README.md"
TAGS = ("mendfast", "model-editing", "knowledge-editing", "mend")
LISTED = 50  # edits on a card
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")

Measured = Mapping[str, Mapping[str, Any]]


class About(NamedTuple):
    """What a card says of one thing."""

    kind: str  # "editor", "edit", "memory"
    title: str  # of the base model, for people
    base_model: str | None  # its name on the Hub
    text: str
    load: str  # Python; {source} stands for the repository
    requests: Sequence[tuple[str, str]] = ()

    def of_memory(self, requests: Sequence[tuple[str, str]]) -> About:
        """Of an editor's: of a memory that it made."""
        lines = self.load.splitlines()
        start = next(i for i, line in enumerate(lines) if line.startswith("editor ="))
        lines[1] = "from mendfast import EditMemory, MendEditor"
        lines[start:] = [
            'editor = MendEditor.from_pretrained("EDITOR", model, tokenizer)  # the one that made it, and no other',
            'memory = EditMemory.from_pretrained("{source}", editor)',
            "memory.apply_()                    # written into the weights",
            "memory.remove(memory.keys()[0])    # and taken out one by one",
        ]
        text = f"A memory of edits of a language model, {len(requests):,} in all, made by mendfast."
        return self._replace(kind="memory", text=text, load="\n".join(lines), requests=requests)


class OnHub:
    """:meth:`push_to_hub` and :meth:`from_pretrained` of what is saved in one file by ``save`` and read by ``load``."""

    hub_file: ClassVar[str]

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *args: Any,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Any:
        """What :meth:`push_to_hub` uploaded, or a directory or file of the same; of a memory the second argument is its
        editor, as of ``load``.

        Args:
            source: a Hub repository, a directory, or a file.
            revision: of a repository: branch, tag or commit.
            token: for private repositories; None: that of ``hf auth login``.
            cache_dir: where downloads are kept; None: where huggingface_hub keeps them.
            local_files_only: take what was downloaded before; nothing is asked over the network.

        Raises:
            FileNotFoundError: neither here nor to be had from the Hub.
            ValueError: as ``load``.
        """
        path = Path(source)
        if not path.is_file():
            options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
            path = located(source, [cls.hub_file], revision=revision, **options) / cls.hub_file
        elif revision is not None:
            raise ValueError(f"revision is {shown(revision)}, a version on the Hub; {source} is on this machine.")
        if not path.is_file():
            raise FileNotFoundError(f"{source} holds no {cls.hub_file}.")
        return cls.load(path, *args)  # type: ignore[attr-defined]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        measured: Measured | None = None,
        base_model: str | None = None,
        license: str | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        **options: Any,
    ) -> str:
        """Upload it with a model card (README.md), in one commit. Returns where.

        Args:
            measured: figures for the card, under the command that measures them:
                ``{"mendfast eval --editor ...": {"edit success": 0.97, "drawdown": 0.007}}``.
            base_model: the base model's name on the Hub; by default what the model was loaded by.
            license: for the card, as the Hub names it ("apache-2.0").
            token: None: that of ``hf auth login``.
            revision: the branch to commit to, made where there is none.
            options: as ``huggingface_hub.HfApi.create_repo`` takes them (``private=True``, ...).

        Raises:
            ValueError: no repository's name, or figures that are no numbers; before anything is uploaded.
        """
        if not isinstance(repo_id, str) or not _REPOSITORY.fullmatch(repo_id):
            raise ValueError(f"repo_id is {shown(repo_id)}; it must be a repository's name, owner/name.")
        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as directory:
            self._save_in(Path(directory))
            text = card(self._about(), repo_id, measured=measured, base_model=base_model, license=license)
            (Path(directory) / CARD_FILE).write_text(text, encoding="utf-8")
            api = HfApi(token=token)
            api.create_repo(repo_id, exist_ok=True, **options)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            found = api.upload_folder(
                repo_id=repo_id, folder_path=directory, revision=revision, commit_message=commit_message
            )
        return str(found)

    def _save_in(self, directory: Path) -> None:
        self.save(directory / self.hub_file)  # type: ignore[attr-defined]

    def _about(self) -> About:
        raise NotImplementedError


def located(source: str | Path, files: Sequence[str], *, revision: str | None = None, **options: Any) -> Path:
    """The directory that ``source`` names, or one with ``files`` of the Hub's repository of that name.

    Args:
        options: token, cache_dir, local_files_only of ``huggingface_hub.snapshot_download``.

    Raises:
        FileNotFoundError: neither here nor to be had. ValueError: a revision of a directory.
    """
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"revision is {shown(revision)}, a version on the Hub; {source} is on this machine.")
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), allow_patterns=list(files), revision=revision, **options))
    except Exception as error:
        where = "the Hub's cache does not hold it" if options.get("local_files_only") else "the Hub did not give it"
        raise FileNotFoundError(
            f"{str(source)!r} is no directory here, and {where} either: {brief(' '.join(str(error).split()), 300)}"
        ) from error


def name_on_hub(model: Any) -> str | None:
    """The repository that a model was loaded from; None where it is a directory, or not known."""
    name = getattr(getattr(model, "config", None), "name_or_path", None)
    return name if isinstance(name, str) and _REPOSITORY.fullmatch(name) and not Path(name).exists() else None


# -- the card ----------------------------------------------------------------------------------------------


def card(
    about: About,
    source: str,
    *,
    measured: Measured | None = None,
    base_model: str | None = None,
    license: str | None = None,
) -> str:
    """A model card: metadata as the Hub reads them, and Markdown."""
    from huggingface_hub import ModelCardData

    base = base_model or about.base_model
    load = about.load.format(source=source, base=base or "...")
    data = ModelCardData(
        base_model=base, library_name="mendfast", license=license, tags=[*TAGS, f"mendfast-{about.kind}"]
    )
    parts = [
        f"---\n{data.to_yaml().rstrip()}\n---",
        f"# {source.rpartition('/')[2]}",
        f"{about.text} Base model: {_plain(base or about.title)}.",
        f"## Use\n\nWith mendfast installed:\n\n```python\n{load}\n```",
    ]
    if about.requests:
        rows = [f"| {_cell(prompt)} | {_cell(target)} |" for prompt, target in about.requests[:LISTED]]
        more = f"\n\nand {len(about.requests) - LISTED:,} more." if len(about.requests) > LISTED else ""
        parts.append("## Edits\n\n" + "\n".join(["| asked | answered |", "|---|---|", *rows]) + more)
    if measured:
        parts.append("## Measured\n\n" + "\n\n".join(_table(*item) for item in measured.items()))
    return "\n\n".join(parts) + "\n"


def _table(command: str, figures: Mapping[str, Any]) -> str:
    if not isinstance(command, str) or not isinstance(figures, Mapping):
        raise ValueError(
            f"measured holds {shown(command)}: {shown(figures)}; it must be {{command: {{figure: number}}}}."
        )
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))
    rows = [f"| {_cell(name)} | {_number(name, value)} |" for name, value in figures.items()]
    return "\n".join(["| figure | value |", "|---|---|", *rows]) + f"\n\nby\n\n{fence}bash\n{command}\n{fence}"


def _number(name: str, value: Any) -> str:
    """A number, or one with an interval, as ``mendfast eval`` writes it."""
    if isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value):
        mean, low, high = (_number(name, value[part]) for part in ("mean", "low", "high"))
        return f"{mean} ({low} to {high})"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"The figure {shown(name)} is {shown(value)}; it must be a number.")
    return f"{value:.4g}"


def _plain(text: str) -> str:
    """Text that Markdown leaves alone, in one line."""
    return re.sub(r"([\\`*_\[\]<>|#])", r"\\\1", " ".join(text.split()))


def _cell(text: str) -> str:
    return _plain(brief(str(text), 200))
