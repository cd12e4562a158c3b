"""`lora-sr report`: one page on adaptations, training runs and comparisons."""

from __future__ import annotations

import argparse

from lora_sr.cli.arguments import tell_written


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the sub-command to `lora-sr`."""
    parser = commands.add_parser(
        'report',
        help='one page on adaptations, training runs and comparisons',
        description='Write one HTML page, which needs nothing else and fetches nothing: curves, tables, and of an '
        'adaptation images before and after. Several runs have their curves together, and a section each.',
    )
    parser.add_argument(
        'runs',
        nargs='+',
        metavar='RUN',
        help='folder of `lora-sr adapt` or of a training run, or table of `lora-sr compare` (.md, .csv, .json)',
    )
    parser.add_argument('-o', '--output', required=True, metavar='PAGE', help='file to write (.html)')
    parser.add_argument('--metric', default='psnr', help='name in val.metrics of training runs (default: psnr)')
    parser.add_argument(
        '--import',
        dest='imports',
        action='append',
        default=[],
        metavar='MODULE',
        help='module, or .py file, that registers a network of your own that was adapted; may be repeated',
    )
    parser.add_argument('--overwrite', action='store_true', help='replace the page where it exists')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Write the page."""
    from lora_sr.report.page import write_reports

    write_reports(args.runs, args.output, args.metric, args.imports, args.overwrite)
    tell_written(args.output)
