"""The commands `nlutils study` and `nlutils predict`: their arguments, and what these are passed on to."""

import argparse
from pathlib import Path

from nlutils.cli_words import count, pairs, place

__all__ = ["add_predict", "add_study", "with_action"]

_FORM = argparse.RawDescriptionHelpFormatter

# Which clips are meant when none are named.
_OTHERWISE = "those of the plan, else $NLUTILS_CLIPS, else auto"

_STUDY = """\
Train and test networks on clips, and print a table: accuracy with its interval, size, time, memory.

A folder of clips has a sub-folder for each class: FOLDER/<class>/*.mp4. Each network is trained on all folds
but one and tested on that one, for every fold. Clips of one group (a film, a person) lie in one fold. Without
a labels.csv with the columns group and fold, a clip's group is the part of its file's name like g07 or
person07, else the whole name: clips of the same file name are one group, whatever their class. Groups are
dealt to five folds, or to as many as there are groups. data/README.md says more.

Each run is recorded as soon as it is done. The same command again goes on where it was stopped, and prints
the table from what is recorded."""

_STUDY_EXAMPLES = """\
examples:
  nlutils data check my_clips
  nlutils study --data my_clips --set epochs=4 --fold 0 --name first_try
  nlutils study --data my_clips --model c3d_small --model c3d_small_non_local --jobs 2 --keep-weights
  nlutils study table my_clips --root build/results
  nlutils study run core8 --part architectures --jobs 2"""

_CHOOSE = """\
For every two folds, each candidate is trained on the three others and tested on both. For a fold K, the
candidate is chosen that is right most often on the other folds in runs that left K out: the clips of K have
no say in what K is tested with."""

_PREDICT = """\
Classify one clip with weights that a study kept, and print the classes, the most probable first. For a
network with non-local blocks, draw what each block looks at from a place in the clip: the picture shows the
frames that the network sees, and over them the weights of all places in all frames."""

_PREDICT_EXAMPLES = """\
examples:
  nlutils study --data my_clips --model c3d_small_non_local --fold 0 --keep-weights
  nlutils predict my_clips/c3d_small_non_local-fold0-seed0 clip.mp4
  nlutils predict my_clips/c3d_small_non_local-fold0-seed0 clip.mp4 --query 8,20,28 --query 0,20,28"""


def with_action(words: list[str]) -> list[str]:
    """`study --data X` as `study clips --data X`: to study a folder of clips, no action is named."""
    first = next((at for at, word in enumerate(words) if not word.startswith("-")), None)
    if first is None or words[first] != "study":
        return words
    behind = words[first + 1 : first + 2]
    if behind and (not behind[0].startswith("-") or behind[0] in ("-h", "--help")):
        return words
    return [*words[: first + 1], "clips", *words[first + 1 :]]


def add_study(commands) -> None:
    """Add `study` to the sub-commands of a parser."""
    study = commands.add_parser(
        "study",
        parents=[_options(named=True)],
        help="train and compare networks on clips",
        usage="nlutils study --data FOLDER [options]\n       nlutils study ACTION ...",
        description=_STUDY,
        epilog=_STUDY_EXAMPLES,
        formatter_class=_FORM,
    )
    actions = study.add_subparsers(metavar="ACTION", required=True, prog="nlutils study")
    clips = actions.add_parser("clips", parents=[_options(named=True)], prog="nlutils study")
    clips.set_defaults(command=_study_clips)
    run = actions.add_parser(
        "run",
        parents=[_options()],
        help="a planned study (core8, procedural, same_pattern), or the same for clips and a name of your "
        "choice, recorded in data/results",
        epilog=_STUDY_EXAMPLES,
        formatter_class=_FORM,
    )
    run.add_argument("study", metavar="STUDY", help="the study's name: its runs are files in ROOT/STUDY")
    run.set_defaults(command=_study_run)
    plan = actions.add_parser(
        "plan", help="list the parts and rows of the comparison, and how many are recorded"
    )
    plan.add_argument("study", metavar="STUDY", nargs="?", default="core8", help="(core8)")
    plan.add_argument("--root", type=Path, metavar="FOLDER", help="where runs are recorded (data/results)")
    plan.set_defaults(command=_study_plan)
    choose = actions.add_parser(
        "choose",
        help="try settings on the training folds alone, and say what each fold chooses",
        description=_CHOOSE,
        formatter_class=_FORM,
    )
    choose.add_argument("study", metavar="STUDY", help="recorded in ROOT/STUDY-choice")
    choose.add_argument(
        "--data", metavar="FOLDER", help="clips (of the plan, else $NLUTILS_CLIPS, else auto)"
    )
    choose.add_argument("--family", action="append", dest="families", metavar="NAME",
                        help="a network whose candidates are tried; may be repeated (all)")  # fmt: skip
    choose.add_argument("--jobs", type=count, default=1, metavar="N", help="runs at a time (1)")
    choose.add_argument("--root", type=Path, metavar="FOLDER", help="where runs are recorded (data/results)")
    choose.set_defaults(command=_study_choose)
    table = actions.add_parser("table", help="print the table of a study's recorded runs")
    table.add_argument("study", metavar="STUDY")
    table.add_argument("--root", type=Path, metavar="FOLDER", help="where runs are recorded (data/results)")
    table.set_defaults(command=_study_table)
    readme = actions.add_parser("readme", help="put a study's table and picture into the README")
    readme.add_argument("study", metavar="STUDY")
    readme.set_defaults(command=_study_readme)
    pages = actions.add_parser("pages", help="write data/results/STUDY/README.md, all tables, of every study")
    pages.add_argument("--root", type=Path, metavar="FOLDER", help="where runs are recorded (data/results)")
    pages.set_defaults(command=_study_pages)


def _options(named: bool = False) -> argparse.ArgumentParser:
    """What both ways to run a study can be told; with `named` the study has a name unless given one."""
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    known = "clips; or core8, jhmdb21, procedural or auto"
    add("--data", metavar="FOLDER", help=known if named else f"{known} ({_OTHERWISE})")
    if named:
        add("--name", help="the study's name (the folder's)")
    add("--model", dest="models", action="append", metavar="NAME",
        help="a network, see `nlutils models`; may be repeated (five small ones)")  # fmt: skip
    add("--row", dest="rows", action="append", metavar="ROW",
        help="a row of the comparison, with its options and settings; may be repeated")  # fmt: skip
    add("--part", dest="parts", action="append", metavar="PART",
        help="all rows of a part, see `nlutils study plan`, with its seeds; may be repeated")  # fmt: skip
    add("--fold", dest="folds", type=int, action="append", metavar="K", help="may be repeated (all)")
    add("--seed", dest="seeds", type=int, action="append", metavar="S", help="may be repeated (0)")
    add("--set", dest="recipe", action="append", default=[], metavar="NAME=VALUE",
        help="a setting of the recipe, such as epochs=40; may be repeated")  # fmt: skip
    add("--init", metavar="FROM", help="the first weights: procedural, inflated, or a file's path from the "
        "project's root; the same as --set init=FROM")  # fmt: skip
    add("--jobs", type=count, default=1, metavar="N", help="runs at a time (1)")
    add("--threads", type=count, default=1, metavar="N", help="CPU threads a run (1)")
    add("--cluster", metavar="ADDRESS", help="do the runs on a Ray cluster: local, auto or an address")
    add("--device", help="cpu, cuda or cuda:N (the GPU when there is one)")
    add(
        "--keep-weights",
        action="store_true",
        help="keep what is trained, in ROOT/STUDY/weights, for `nlutils predict`",
    )
    add("--root", type=Path, metavar="FOLDER",
        help=f"where runs are recorded ({'build' if named else 'data'}/results)")  # fmt: skip
    return shared


def add_predict(commands) -> None:
    """Add `predict` to the sub-commands of a parser."""
    predict = commands.add_parser(
        "predict",
        help="classify a clip with a trained network, and draw what it looks at",
        description=_PREDICT,
        epilog=_PREDICT_EXAMPLES,
        formatter_class=_FORM,
    )
    predict.add_argument(
        "model",
        metavar="MODEL",
        help="STUDY/RUN of data/results or build/results, trained with --keep-weights; or its .pt file",
    )
    predict.add_argument("clip", metavar="CLIP", help="a video file")
    predict.add_argument("--query", dest="queries", type=place, action="append", metavar="STEP,ROW,COLUMN",
                         help="a place in the frames that the network sees, 16 of 40 x 56 pixels unless its "
                         "recipe said otherwise; counted from 0; may be repeated (what moves most in the "
                         "middle step)")  # fmt: skip
    predict.add_argument("--output", type=Path, metavar="FILE", help="the picture (build/predict/CLIP.png)")
    predict.set_defaults(command=_predict)


def _study_run(options) -> int:
    from nlutils.study.command import study_named

    return study_named(options, pairs(options.recipe))


def _study_clips(options) -> int:
    from nlutils.study.command import study_clips

    return study_clips(options, pairs(options.recipe))


def _study_plan(options) -> int:
    from nlutils.study.command import print_plan

    return print_plan(options.study, options.root)


def _study_choose(options) -> int:
    from nlutils.study.command import choose_settings

    return choose_settings(options)


def _study_table(options) -> int:
    from nlutils.study.command import print_table

    return print_table(options.study, options.root)


def _study_pages(options) -> int:
    from nlutils.paths import shown
    from nlutils.study import write_results_pages

    for path in write_results_pages(options.root):
        print(f"written: {shown(path)}")
    return 0


def _study_readme(options) -> int:
    from nlutils.study import write_readme_table

    print(write_readme_table(options.study))
    return 0


def _predict(options) -> int:
    from nlutils.study.command import predict_clip

    return predict_clip(options)
