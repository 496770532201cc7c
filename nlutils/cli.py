"""The command `nlutils`: reads the arguments and calls the room that does the work."""

import argparse
import sys
from pathlib import Path

from nlutils.cli_study import add_predict, add_study, with_action
from nlutils.cli_words import count, pairs

__all__ = ["main"]


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns its exit code: 0 well, 1 something failed, 2 bad input, 130 Ctrl-C."""
    options = _parser().parse_args(with_action(sys.argv[1:] if arguments is None else arguments))
    try:
        return options.command(options)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ArithmeticError, ImportError) as error:
        if options.traceback:
            raise
        print(f"nlutils: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nlutils",
        description="Non-local neural networks, step by step: run the notebooks, compare networks on clips.",
        epilog="""examples:
  nlutils doctor                           is this machine ready?
  nlutils run                              run all notebooks
  nlutils data check my_clips              what is wrong with a folder of clips
  nlutils study --data my_clips            compare the small networks on it
  nlutils COMMAND --help                   what a command does, and its options""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--traceback", action="store_true", help="show where in the code an error comes from")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_run(commands.add_parser("run", help="run the notebooks in order and print the comparison"))
    commands.add_parser("doctor", help="check this machine").set_defaults(command=_doctor)
    _add_data(commands.add_parser("data", help="data sets: list, fetch, check"))
    add_study(commands)
    add_predict(commands)
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
    run.add_argument("--jobs", type=count, help="notebooks at a time (two where there are two cores)")
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


def _add_models(models) -> None:
    models.add_argument("name", nargs="?", help="one network: its facts, options and published files (all)")
    models.add_argument("--classes", type=count, help="how many (those of the data set it is known for)")
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
        parameters=pairs(options.parameters),
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


def _models(options) -> int:
    from nlutils.study.listing import load_published, model_page, models_table

    told = pairs(options.options)
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


if __name__ == "__main__":
    sys.exit(main())
