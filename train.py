"""Train what the command line describes; `python train.py --help` shows how."""

import sys


def run(cfg):
    """Import what trains only once there is something to train."""
    from tracklight.experiment.train import run

    return run(cfg)


if __name__ == "__main__":
    try:
        from tracklight.cli import main
    except ModuleNotFoundError as error:
        print(f"no {error.name} here: `source .venv/bin/activate` or `make train`", file=sys.stderr)
        sys.exit(2)
    main(run)
