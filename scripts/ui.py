"""See `python scripts/ui.py --help`."""

import sys

if __name__ == "__main__":
    try:
        from tracklight.reuse.command import enter
        from tracklight.reuse.ui import main
    except ModuleNotFoundError as error:
        print(f"no {error.name} here: `source .venv/bin/activate` or `make train`", file=sys.stderr)
        sys.exit(2)
    enter(main)
