"""See `python scripts/compare.py --help`."""

from entry import enter

if __name__ == "__main__":
    enter("compare")
