"""The command `nlutils`: reads the arguments and calls the room that does the work."""

import argparse
import ast
import sys
from pathlib import Path

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 well, 1 something failed, 2 bad input, 130 Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ArithmeticError) as error:
        if options.traceback:
            raise
        print(f"nlutils: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="nlutils", description="Non-local neural networks, step by step.")
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error comes from")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands.add_parser("run", help="run the notebooks in order and print the comparison"))
    commands.add_parser("doctor", help="check this machine").set_defaults(command=_doctor)
    _add_data(commands.add_parser("data", help="data sets: list, fetch, check"))
    _add_study(commands.add_parser("study", help="train and compare networks"))
    _add_models(commands.add_parser("models", help="list the networks; read published checkpoints"))
    _add_notebooks(commands.add_parser("notebooks", help="make the notebooks from their sources; check them"))
    commands.add_parser("lock", help="pin what is installed").set_defaults(command=_lock)
    return parser


def _add_run(run) -> None:
    run.add_argument(
        "names", nargs="*", metavar="NOTEBOOK", help="04, formulation, 04_formulation or a path; all"
    )
    run.add_argument("--profile", help="quick (the default), full or gpu")
    run.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE")
    run.add_argument("--output", default="build/run", help="folder of executed copies and logs (build/run)")
    run.add_argument("--jobs", type=_count, help="notebooks at a time (two where there are two cores)")
    run.set_defaults(command=_run)


def _add_data(data) -> None:
    actions = data.add_subparsers(metavar="ACTION", required=True)
    actions.add_parser("list", help="which data sets there are").set_defaults(command=_data_list)
    fetch = actions.add_parser("fetch", help="download a data set, after showing its size and terms")
    fetch.add_argument("name")
    fetch.add_argument("--yes", action="store_true", help="do not ask")
    fetch.set_defaults(command=_data_fetch)
    check = actions.add_parser("check", help="list the faults of a folder of clips")
    check.add_argument("folder", type=Path)
    check.set_defaults(command=_data_check)


def _add_study(study) -> None:
    actions = study.add_subparsers(metavar="ACTION", required=True)
    run = actions.add_parser("run", help="train and test networks on every fold; recorded runs are kept")
    run.add_argument("study", help="the folder of results, data/results/STUDY")
    run.add_argument("--model", dest="models", action="append", help="a network, may be repeated (all)")
    run.add_argument("--data", help="core8, jhmdb21, procedural or a folder (NLUTILS_CLIPS, else auto)")
    run.add_argument("--fold", dest="folds", type=int, action="append", help="may be repeated (all)")
    run.add_argument("--seed", dest="seeds", type=int, action="append", help="may be repeated (0)")
    run.add_argument("--set", dest="recipe", action="append", default=[], metavar="NAME=VALUE",
                     help="a setting of the recipe, such as epochs=40")  # fmt: skip
    run.add_argument("--jobs", type=_count, default=1, help="runs at a time (1)")
    run.add_argument("--threads", type=_count, default=1, help="CPU threads a run (1)")
    run.set_defaults(command=_study_run)
    table = actions.add_parser("table", help="print the table of a study's recorded runs")
    table.add_argument("study")
    table.set_defaults(command=_study_table)
    readme = actions.add_parser("readme", help="put a study's table and picture into the README")
    readme.add_argument("study")
    readme.set_defaults(command=_study_readme)


def _add_models(models) -> None:
    models.add_argument("name", nargs="?", help="one network: its facts, options and published files (all)")
    models.add_argument("--classes", type=_count, help="how many (those of the data set it is known for)")
    models.add_argument("--set", dest="options", action="append", default=[], metavar="NAME=VALUE",
                        help="an option of the network, such as non_local=5")  # fmt: skip
    models.add_argument("--load", type=Path, metavar="FILE",
                        help="a published checkpoint; prints what it lacks or has too much")  # fmt: skip
    models.set_defaults(command=_models)


def _add_notebooks(notebooks) -> None:
    actions = notebooks.add_subparsers(metavar="ACTION", required=True)
    for name, command, help_text in (
        ("build", _notebooks_build, "make and run the committed notebooks from notebooks/src"),
        ("check", _notebooks_check, "check the committed notebooks against their contract and sources"),
        ("solutions", _notebooks_solutions, "write the solved notebooks to build/solutions and run them"),
    ):
        action = actions.add_parser(name, help=help_text)
        action.add_argument(
            "names", nargs="*", metavar="NOTEBOOK", help="04, formulation or 04_formulation (all)"
        )
        action.set_defaults(command=command)


def _run(options) -> int:
    from nlutils.course.runner import run_all

    return run_all(
        options.names,
        profile=options.profile,
        parameters=_pairs(options.parameters),
        output=options.output,
        jobs=options.jobs,
    )


def _doctor(options) -> int:
    from nlutils.course import doctor

    return doctor.main()


def _lock(options) -> int:
    from nlutils.course.environment import write_lock

    write_lock()
    return 0


def _data_list(options) -> int:
    from nlutils.video import CATALOGUE, describe_source

    for entry in CATALOGUE.values():
        print(f"{entry.name}: {entry.title}\n  page   {entry.page}\n  terms  {entry.terms}")
    print(describe_source())
    return 0


def _data_fetch(options) -> int:
    from nlutils.video import fetch

    fetch(options.name, yes=options.yes)
    return 0


def _data_check(options) -> int:
    from nlutils.video import report_folder

    return report_folder(options.folder)


def _study_run(options) -> int:
    from nlutils.study import Recipe, markdown_table, run_study, summarise
    from nlutils.video import open_clips

    try:
        recipe = Recipe(**_pairs(options.recipe))
    except TypeError as error:
        raise ValueError(f"--set: {error}") from error
    runs = run_study(
        options.study,
        options.models,
        options.folds,
        options.seeds or (recipe.seed,),
        open_clips(options.data),
        recipe,
        jobs=options.jobs,
        threads=options.threads,
    )
    print(markdown_table(summarise(runs)))
    return 0


def _study_table(options) -> int:
    from nlutils.study import markdown_table, read_runs, summarise

    print(markdown_table(summarise(read_runs(options.study))))
    return 0


def _study_readme(options) -> int:
    from nlutils.study import write_readme_table

    print(write_readme_table(options.study))
    return 0


def _models(options) -> int:
    from nlutils.study.listing import load_published, model_page, models_table

    told = _pairs(options.options)
    if options.name is None and options.load is None:
        if told or options.classes:
            raise ValueError("--set and --classes need the NAME of a network, or --load FILE")
        print(models_table())
        return 0
    try:
        if options.load is None:
            print(model_page(options.name, options.classes, **told))
            return 0
        report = load_published(options.load, options.name, options.classes, told)
    except TypeError as error:
        raise ValueError(f"--set: {error}") from error
    print(report)
    return int(bool(report.missing or report.unexpected))


def _notebooks_build(options) -> int:
    from nlutils.course.sources import build

    return build(options.names)


def _notebooks_check(options) -> int:
    from nlutils.course.contract import violations
    from nlutils.course.runner import notebook_paths
    from nlutils.course.sources import disagreements

    paths = notebook_paths(options.names)
    found = [sentence for path in paths for sentence in violations(path) + disagreements(path)]
    print("\n".join(found) if found else f"{len(paths)} notebooks keep the contract.")
    return int(bool(found))


def _notebooks_solutions(options) -> int:
    from nlutils.course.solutions import build

    return build(options.names)


def _pairs(texts: list[str]) -> dict:
    """{"epochs": 3} from ["epochs=3"]; a value that is no Python literal is taken as text."""
    words = {"true": True, "false": False}
    pairs = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.isidentifier():
            raise ValueError(f"{text!r} is not of the form NAME=VALUE")
        try:
            pairs[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            pairs[name] = words.get(value, value)
    return pairs


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, 1 or more")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
