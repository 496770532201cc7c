"""`nlutils study` and `nlutils predict`: from a command line's options to the functions that do the work.

Whatever can be wrong with the options is found before clips are decoded, for that may take minutes.
"""

import re
from pathlib import Path

from nlutils.arguments import one_of
from nlutils.paths import atomic_path, own_results_root, project_root, results_root, shown
from nlutils.study import distributed
from nlutils.study.checks import check_name, check_study
from nlutils.study.choice import pairs
from nlutils.study.grid import entries
from nlutils.study.outcome import run_name
from nlutils.study.plan import CANDIDATES, PARTS, STUDIES, Study
from nlutils.study.recipe import Recipe
from nlutils.study.results import is_recorded, read_runs, run_path
from nlutils.study.rows import rows_of
from nlutils.study.start import start_digest
from nlutils.study.study import run_study
from nlutils.study.tables import by_row, choice_table, markdown_table, summarise, title_of
from nlutils.study.weights import weights_path
from nlutils.torch.models.small import SMALL_MODELS
from nlutils.video import catalogue
from nlutils.video.folder import study_folds, weak_classes
from nlutils.video.labels import FOLDS

__all__ = ["choose_settings", "predict_clip", "print_plan", "print_table", "study_clips", "study_named"]


def study_named(options, settings: dict) -> int:
    """`nlutils study run STUDY`; `settings` are those of its --set.

    A study of the plan brings its clips, settings and parts along, unless --data names other clips.
    """
    return _study(options.study, options, settings, options.root or results_root(), _planned(options))


def _planned(options) -> Study:
    """The study of the plan that the options name; one of the clips of --data, when they name some."""
    asked = Study(options.data, ())
    return asked if options.data else STUDIES.get(options.study, asked)


def study_clips(options, settings: dict) -> int:
    """`nlutils study --data FOLDER`: the same, named after the folder, recorded in build/results."""
    if options.data is None:
        raise ValueError("study: give a folder of clips, --data FOLDER; or an action: run, table, readme")
    name = options.name or _name_of(options.data)
    return _study(name, options, settings, options.root or own_results_root(), Study(options.data, ()))


def print_table(study: str, root=None) -> int:
    """`nlutils study table STUDY`."""
    print(markdown_table(summarise(read_runs(study, root))))
    return 0


def _study(study, options, settings, root, planned: Study) -> int:
    check_name("study", study)
    recipe = _recipe({**planned.recipe, **settings}, options.init)
    folds = _folds(planned.clips, options.folds)
    wanted = _wanted(options, settings, planned.parts)
    ways = {name: getattr(options, name) for name in ("jobs", "threads", "cluster", "device", "keep_weights")}
    # Parts share rows, and a run counts once.
    names = {
        run_name(row, fold, seed)
        for seeds, rows in wanted
        for row in rows
        for fold in folds
        for seed in seeds
    }
    for seeds, rows in wanted:
        check_study(study, rows, folds, seeds, recipe, **ways)
        for entry in rows.values():
            for fold in folds:
                start_digest(recipe.replace(**{**entry.recipe, "seed": seeds[0]}), fold)
    if options.keep_weights and distributed.first():
        _refuse_records_without_weights(study, sorted(names), root)
    clips = catalogue.open_clips(planned.clips, **planned.options)
    _say(f"{study}: {clips.source}; {_count(len(names), 'run')}")
    for line in _consequences(clips):
        _say(line)
    runs = {}
    for seeds, rows in wanted:
        done = run_study(
            study, rows, folds if options.folds else None, seeds, clips, recipe, root=root, **ways
        )
        runs |= {run.run: run for run in done}
    _say(markdown_table(summarise(runs.values())))
    _say(f"recorded in {shown(Path(root) / study)}")
    if options.keep_weights:
        kept = weights_path(study, next(iter(runs)), root)
        known = Path(root).resolve() in (results_root().resolve(), own_results_root().resolve())
        name = f"{study}/{kept.stem}" if known else shown(kept)
        _say(f"weights in {shown(kept.parent)}; use them: nlutils predict {name} CLIP")
    return 0


def _wanted(options, settings, planned) -> list[tuple[list[int], dict]]:
    """[(seeds, rows)]: networks and rows with the seeds that are asked for, parts with their own.

    Where none are asked for they are the parts that are `planned`, or the small networks.
    """
    asked = options.seeds
    if "seed" in settings:
        if asked:
            raise ValueError(
                f"--seed {asked[0]} and --set seed={settings['seed']} are one setting; give --seed, which "
                "may be repeated"
            )
        asked = [settings["seed"]]
    seeds = sorted(set(asked or [Recipe().seed]))
    parts, networks = options.parts or [], options.models or []
    if not (networks or options.rows or parts):
        parts, networks = planned, [] if planned else list(SMALL_MODELS)
    wanted = [(seeds, entries(networks) | entries(rows_of(options.rows or [])))]
    for name in parts:
        part = PARTS[one_of("part", name, PARTS)]
        wanted.append((seeds if asked else list(part.seeds), entries(rows_of(part.rows))))
    return [(seeds, rows) for seeds, rows in wanted if rows]


def print_plan(study: str, root=None) -> int:
    """`nlutils study plan`: every part with its rows, and how many folds and seeds of each are recorded."""
    recorded = by_row(read_runs(study, root)) if is_recorded(study, root) else {}
    for name in STUDIES[study].parts if study in STUDIES else PARTS:
        part = PARTS[name]
        print(f"{name}: {part.title}; {_count(len(part.seeds), 'seed')}")
        for row in part.rows:
            done = sum(run.seed in part.seeds for run in recorded.get(row, []))
            print(f"  {row:32} {done:3} of {FOLDS * len(part.seeds):2} runs  {title_of(row)}")
    return 0


def choose_settings(options) -> int:
    """`nlutils study choose STUDY`: run the candidates on pairs of folds, print what each fold chooses."""
    root = options.root or results_root()
    families = {
        name: CANDIDATES[one_of("family", name, CANDIDATES)] for name in options.families or CANDIDATES
    }
    study, planned = f"{check_name('study', options.study)}-choice", _planned(options)
    recipe = Recipe().replace(**planned.recipe)
    pairs(_folds(planned.clips, None))  # refuses too few of them before clips are decoded
    clips = catalogue.open_clips(planned.clips, **planned.options)
    left_out = pairs({clip.fold for clip in clips.clips})
    for family, candidates in families.items():
        rows = {f"{family}-{name}": entry for name, entry in candidates.items()}
        done = run_study(study, rows, left_out, clips=clips, recipe=recipe, jobs=options.jobs, root=root)
        found = by_row(done)
        # Of equal candidates the first is chosen: the order is theirs.
        print(choice_table({row: found[row] for row in rows}))
    return 0


def _say(line):
    """Print it, once where several processes train together."""
    if distributed.first():
        print(line, flush=True)


def _recipe(settings, init) -> Recipe:
    """The recipe of --set and --init."""
    if init is not None:
        if "init" in settings:
            raise ValueError(f"--init {init} and --set init={settings['init']} are one setting; give one")
        settings = settings | {"init": init}
    try:
        return Recipe().replace(**settings)
    except TypeError as error:
        raise ValueError(f"--set: {error}") from error


def _folds(data, wanted) -> list[int]:
    """The folds to run, told without decoding a clip; ValueError for one that the clips do not have."""
    chosen = catalogue.chosen_clips(data)
    folds = study_folds(chosen) if isinstance(chosen, Path) else list(range(FOLDS))
    for fold in wanted or ():
        if fold not in folds:
            raise ValueError(f"fold={fold} is not a fold of {data or chosen}; it has {folds}")
    return sorted(set(wanted)) if wanted else folds


def _refuse_records_without_weights(study, names, root):
    lost = [
        name
        for name in names
        if run_path(study, name, root).is_file() and not weights_path(study, name, root).is_file()
    ]
    if lost:
        raise ValueError(
            f"--keep-weights: recorded in {shown(Path(root) / study)} without weights: {', '.join(lost[:3])}"
            f"{' ...' if len(lost) > 3 else ''}. Recorded runs are not trained again; name another folder of "
            "results, such as --root build/with_weights"
        )


def _consequences(clips) -> list[str]:
    """What is missing from a set of clips, and what that means for the study, a line each."""
    said = [f"left out: {fault.path}: {fault.cause}" for fault in clips.faults]
    weak = weak_classes(clips.classes, [(clips.classes[clip.label], clip.fold) for clip in clips.clips])
    said += [f"class {kind}: {cause}" for kind, cause in weak.items()]
    folds = len({clip.fold for clip in clips.clips})
    if folds < FOLDS:
        said.append(f"{folds} folds, not {FOLDS}: each network is trained on fewer of the clips")
    return said


def _name_of(data: str) -> str:
    """A study's name from that of a folder: whatever is no letter, digit or _ . + - becomes _."""
    name = Path(data).expanduser().resolve().name
    return re.sub(r"[^\w.+-]+", "_", name).strip("._+-") or "clips"


def _count(number, noun):
    return f"{number} {noun}" + ("" if number == 1 else "s")


def predict_clip(options) -> int:
    """`nlutils predict MODEL CLIP`."""
    import matplotlib.pyplot as plt

    from nlutils.study.predict import draw_prediction, predict

    clip = Path(options.clip)
    output = options.output or project_root() / "build" / "predict" / f"{clip.stem}.png"
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output}: the picture is a PNG file; give a name that ends in .png")
    prediction = predict(options.model, clip, queries=options.queries)
    print(f"{prediction.clip} by {prediction.run} ({prediction.model})")
    for kind, probability in prediction.ranked():
        print(f"{100 * probability:6.1f} %  {kind}")
    if not prediction.attention:
        print(f"{prediction.model} has no block with a map of pairs of places: there is none to draw")
        return 0
    figure, alt = draw_prediction(prediction)
    with atomic_path(output) as temporary:
        figure.savefig(temporary, dpi=130, metadata={"Description": alt, "Software": None})
    plt.close(figure)
    print(f"picture: {shown(output)}\n{alt}")
    return 0
