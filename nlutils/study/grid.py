"""The cells of a study's grid: a row, a fold and a seed each, and whether it is recorded already."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from nlutils.arguments import one_of
from nlutils.paths import cache_root
from nlutils.study.fold import full_options
from nlutils.study.inputs import Inputs
from nlutils.study.outcome import run_name
from nlutils.study.provenance import ROOMS, code_digest
from nlutils.study.recipe import Recipe
from nlutils.study.results import Run, read_run, run_path
from nlutils.study.start import start_digest, start_path
from nlutils.torch.models import model_options

__all__ = ["Cell", "Entry", "entries"]


@dataclass(frozen=True)
class Entry:
    """What a row of the table trains: a network, its options, and how its recipe differs from the study's.

    `title` is what tables call the row; `framework` trains it, "torch" or "keras".
    """

    model: str
    options: Mapping = field(default_factory=dict)
    recipe: Mapping = field(default_factory=dict)
    title: str = ""
    framework: str = "torch"


def entries(models) -> dict[str, Entry]:
    """{row: Entry} from names of networks, {row: (name, options)} or {row: Entry}.

    Options take the form that JSON gives back. Raises ValueError for an unknown network, TypeError for an
    unknown option or setting.
    """
    if not isinstance(models, Mapping):
        models = {name: Entry(name) for name in models}
    made = {}
    for row, entry in models.items():
        entry = entry if isinstance(entry, Entry) else Entry(*entry)
        allowed = model_options(entry.model)
        if unknown := sorted(set(entry.options) - set(allowed)):
            raise TypeError(f"{entry.model} has no option {unknown[0]!r}; it has {', '.join(allowed)}")
        if one_of("framework", entry.framework, ROOMS) == "keras":
            from nlutils.keras.models import model_options as keras_options  # PyTorch users never import it

            keras_options(entry.model)  # raises for a network that Keras does not have
        Recipe().replace(**entry.recipe)
        if shared := sorted({"frames", "resize", "seed"} & set(entry.recipe)):
            raise ValueError(
                f"{row} sets {shared[0]}={entry.recipe[shared[0]]!r}, which all rows of a study share; "
                "give it to the study's recipe"
            )
        options = json.loads(json.dumps(dict(entry.options)))
        made[row] = replace(entry, options=options, recipe=dict(entry.recipe))
    return made


@dataclass(frozen=True)
class Cell:
    """One run to be: `recipe` has the row's changes and the seed in it; `fold` is one, or several."""

    study: str
    row: str
    model: str
    options: Mapping
    fold: int | tuple[int, ...]
    recipe: Recipe
    framework: str = "torch"

    @property
    def name(self) -> str:
        """`<row>-fold<fold>-seed<seed>`."""
        return run_name(self.row, self.fold, self.recipe.seed)

    def recorded(self, inputs: Inputs, root=None) -> Run | None:
        """The run of this cell when it is recorded; ValueError when its settings or clips were others."""
        path = run_path(self.study, self.name, root)
        if not path.is_file():
            return None
        run = read_run(path)
        test_on = inputs.split(self.fold)[1].tolist()
        clips = [(inputs.names[i], inputs.groups[i], int(inputs.labels[i])) for i in test_on]
        options = full_options(self.model, self.options, self.recipe)
        wanted = (
            self.framework,
            self.model,
            options,
            self.recipe,
            inputs.source,
            inputs.classes,
            clips,
        )
        try:
            recipe = Recipe(**run.recipe)  # settings newer than the record were what they are by default
        except TypeError as error:
            raise ValueError(f"{path} has settings that this version does not know: {error}") from error
        seen = list(zip(run.names, run.groups, run.labels, strict=True))
        found = (
            run.framework,
            run.model,
            run.options,
            recipe,
            run.data["source"],
            tuple(run.classes),
            seen,
        )
        if found != wanted or run.data.get("digest", inputs.digest) != inputs.digest:
            raise ValueError(
                f"{path} was recorded with other settings or clips; "
                "give this study another name, or delete the file"
            )
        if (now := self._start()) and now != run.start.get("sha256"):
            raise ValueError(
                f"{path} was recorded with another content of {self.recipe.init}; "
                "give this study another name, or delete the file"
            )
        return run

    def _start(self) -> str:
        """The digest of the file that the run starts from; "" when it names none, or one that is gone."""
        path = start_path(self.recipe, self.fold)
        return start_digest(self.recipe, self.fold) if path is not None and path.is_file() else ""

    def checkpoint(self, inputs: Inputs) -> Path:
        """Where the unfinished run is kept: a name that changes with everything that the run depends on."""
        told = json.dumps(
            [
                code_digest(self.framework),
                self.framework,
                self.model,
                full_options(self.model, self.options, self.recipe),
                self.fold,
                self.recipe.settings(),
                self._start(),
                inputs.source,
                inputs.digest,
            ]
        )
        digest = hashlib.sha256(told.encode()).hexdigest()[:12]
        return cache_root() / "checkpoints" / self.study / f"{self.name}-{digest}.pt"
