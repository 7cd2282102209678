"""See `python scripts/reproduce.py --help`."""

from entry import enter

if __name__ == "__main__":
    enter("reproduce")
