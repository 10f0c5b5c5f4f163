"""What ROME and MEMIT take C from: the model's own words, read once for both, and kept with the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..baselines import SYSTEMS, make_system
from ..baselines.rome import Rome, as_kept, own_texts
from ..layers import Layer
from ..metric import Metric, observe
from ..training.processes import Processes
from .eval_settings import EvalSettings


class Protected:
    """C of all layers that the systems ``keys`` write into, by how many texts it is taken from.

    With ``--output`` it is kept there, so that a run that goes on has the same without reading again.
    """

    def __init__(self, settings: EvalSettings, keys: Sequence[str], processes: Processes):
        self.settings, self.processes = settings, processes
        self.keys = [key for key in keys if issubclass(SYSTEMS[key], Rome)]
        self._found: dict[int, Metric] = {}

    def metric(self, system: Rome) -> Metric:
        """Holds C of the layers of ``system``."""
        words = system.words
        path = Path(self.settings.output) / "protected" / f"{words}.safetensors" if self.settings.output else None
        if words not in self._found and path is not None and path.is_file():
            self._found[words] = Metric.load(path)
        found = self._found.get(words)
        missing = [layer for layer in self._layers(system) if found is None or layer.name not in found.moments]
        if any(layer.name in {own.name for own in system.layers} for layer in missing):
            main = self.processes.main
            bar = None if main else False
            mine = own_texts(system.subject, words, part=self.processes.rank, of=self.processes.count, progress=bar)
            model = system.subject.model
            own = Metric.empty(missing, model.config.model_type)
            if mine:
                own = observe(model, missing, mine, progress=bar)
            first, *others = self.processes.objects(own)
            for other in others:
                first.merge(other)
            seen = as_kept(first)
            moments = {**(found.moments if found else {}), **seen.moments}
            self._found[words] = Metric(moments, seen.model_type, seen.tokens)
            if path is not None and main:
                self._found[words].save(path)
        return self._found[words]

    def _layers(self, system: Rome) -> list[Layer]:
        """Those of ``system``, and of the others that take C from as many texts."""
        layers = {layer.name: layer for layer in system.layers}
        for key in self.keys:
            if key != system.key:
                options, _ = self.settings.options_of(key)
                other = make_system(
                    key, system.subject.model, system.subject.tokenizer, system.subject.config, **options
                )
                assert isinstance(other, Rome)
                if other.words == system.words:
                    layers |= {layer.name: layer for layer in other.layers}
        return list(layers.values())
