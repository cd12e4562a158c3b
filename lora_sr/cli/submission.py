"""`lora-sr submission`: a checkpoint to what a team hands in to a NTIRE efficient SR challenge."""

from __future__ import annotations

import argparse

from lora_sr.cli.arguments import CHECKPOINT, add_network_options, network_source, tell_written


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'submission',
        help='write what a NTIRE efficient SR team hands in, and verify it',
        description='Write models/teamNN_NAME.py, one file that imports torch alone, its weights to model_zoo/, the '
        "branch for the organizers' select_model, and a factsheet with the counts. Before the files appear, the "
        'network is run in a process without this package, and its images compared. SPAN, DSCLoRA, LKDN and LKDN-S '
        'are written out as they run; of a network of your own the module of its class is taken.',
    )
    parser.add_argument('-m', '--model', metavar='CHECKPOINT', help=CHECKPOINT)
    parser.add_argument('--team', required=True, type=int, metavar='N', help='number of the team')
    parser.add_argument('--name', required=True, help='name of the entry, e.g. DSCF')
    parser.add_argument(
        '-o',
        '--output',
        required=True,
        metavar='DIR',
        help="folder to write, or a clone of the organizers' repository, in which nothing else changes",
    )
    parser.add_argument('--overwrite', action='store_true', help='replace files of the submission that exist')
    add_network_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write and verify, and print the counts and the branch to paste."""
    from pathlib import Path

    from lora_sr.deploy.submission import write_submission

    report = write_submission(
        network_source(args, args.model), args.output, args.team, args.name, overwrite=args.overwrite
    )
    print(report)
    for file in report.files:
        tell_written(Path(args.output, file))
    print(f'\nTo paste into select_model in test_demo.py:\n\n{report.branch}', end='')
