"""See `python scripts/predict.py --help`."""

from entry import enter

if __name__ == "__main__":
    enter("predict")
