"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path

import click

data_dir_option = click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("data"),
    show_default=True,
    envvar="SEALPUSH_DATA_DIR",
    help="Directory of the `sealpush up`: its databases, secrets, logs.",
)
