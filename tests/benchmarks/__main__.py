"""``python -m tests.benchmarks [SECTION …] [--quick]``: prints one table a section."""

import argparse
import os

from tests.benchmarks import (
    admin,
    asynchronous,
    checking,
    commands,
    files,
    finding,
    graphs,
    history,
    hot_path,
    on_redis,
    scale,
)

SECTIONS = {
    "history": history.run,
    "hot-path": hot_path.run,
    "async": asynchronous.run,
    "scale": scale.run,
    "finding": finding.run,
    "files": files.run,
    "admin": admin.run,
    "commands": commands.run,
    "redis": on_redis.run,
    "langgraph": graphs.run,
}
LONG = {"ten-million": checking.run}
"""What takes ten minutes, and is run only if it is named."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"Any of: {', '.join(SECTIONS)}. Default: all of these. Beside: {', '.join(LONG)}.",
    )
    parser.add_argument("--quick", action="store_true", help="Smaller; all in under three minutes.")
    options = parser.parse_args()
    every = SECTIONS | LONG
    for section in options.sections:
        if section not in every:
            parser.error(f"no section {section!r}; there are {', '.join(every)}")
    os.environ.pop("DJANGO_SETTINGS_MODULE", None)
    for section in options.sections or SECTIONS:
        every[section](quick=options.quick)


if __name__ == "__main__":
    main()
