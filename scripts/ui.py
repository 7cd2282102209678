"""See `python scripts/ui.py --help`."""

from entry import enter

if __name__ == "__main__":
    enter("ui")
