"""Train what the command line describes; `python train.py --help` shows how."""

import sys

if __name__ == "__main__":
    try:
        from tracklight.cli import main
    except ModuleNotFoundError as error:
        print(f"no {error.name} here: `source .venv/bin/activate` or `make train`", file=sys.stderr)
        sys.exit(2)
    main()
