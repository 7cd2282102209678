"""See `python scripts/evaluate.py --help`."""

from entry import enter

if __name__ == "__main__":
    enter("evaluate")
